//! The command line.

use std::io::{BufReader, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};

use crate::case::{Chosen, DeviceName, read};
use crate::engine::{Library, serve};
use crate::judge::Physics;
use crate::protocol::{Limits, Reply, Request};
use crate::report::Report;
use crate::runner::{Contender, Settings};
use crate::session::{Session, Start};
use crate::trainings::Trainer;
use crate::{Error, Result, chart, compare, limits, machine, runner, seed_method, training, trainings};

#[derive(Parser)]
#[command(
    version,
    about = "candlewick's ops and training steps beside the competition",
    max_term_width = 110
)]
pub struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measure on the processor: ratios
    Cpu(Options),
    /// Measure on an NVIDIA GPU: microseconds, synced, pipelined, and GPU time
    Cuda(Options),
    /// How far two runs' ratios are apart
    Compare { first: PathBuf, second: PathBuf },
    /// Make one report of several, as of the operations' and the training steps'
    Join {
        /// Where it goes
        out: PathBuf,
        /// The folders of the others
        #[arg(required = true)]
        folders: Vec<PathBuf>,
    },
    /// What timing an MLX that never waits prints, beside the truth
    SeedMethod(SeedMethod),
    /// Serve as an engine
    #[command(hide = true)]
    Engine { name: String },
}

/// Where the parts are.
#[derive(Args)]
struct Parts {
    /// The folder with cases and engines [default: bench, or where this program was built]
    #[arg(long, env = "CANDLEWICK_BENCH", value_name = "FOLDER")]
    bench: Option<PathBuf>,
    /// The Python that has the other engines [default: .venv/bin/python in that folder, or python3]
    #[arg(long, env = "CANDLEWICK_BENCH_PYTHON", value_name = "PROGRAM")]
    engine_python: Option<PathBuf>,
    /// Threads of every engine [default: 2; beside a GPU, the machine's]
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Args)]
struct SeedMethod {
    #[command(flatten)]
    parts: Parts,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Args)]
struct Options {
    #[command(flatten)]
    parts: Parts,
    /// The small set
    #[arg(long)]
    small: bool,
    /// Only cases and training steps whose name contains one of these
    #[arg(long, value_delimiter = ',', value_name = "TEXT")]
    only: Vec<String>,
    /// The engines [default: ours, candle, pytorch, mlx, liger on a GPU, peft for training steps]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    engines: Vec<String>,
    /// No training steps
    #[arg(long, conflicts_with = "no_ops")]
    no_training: bool,
    /// Training steps only
    #[arg(long)]
    no_ops: bool,
    /// Where the table, the data and the charts go [default: target/bench/ and the device]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Where tensors pass between the programs [default: /dev/shm where there is one]
    #[arg(long, value_name = "FOLDER")]
    scratch: Option<PathBuf>,
    /// Rounds of a case at most
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Seconds for the rounds of a case; some rounds are always made [default: 1.2; on a GPU 0.6]
    #[arg(long)]
    budget: Option<f64>,
    /// Seconds after which no further case begins [default: never]
    #[arg(long)]
    limit: Option<f64>,
    /// Fresh processes for each training step and engine [default: 2 for tiny, else 1]
    #[arg(long)]
    training_rounds: Option<usize>,
    /// Seconds that a training step may be expected to take, by the engine's pace with a smaller model
    #[arg(long, default_value_t = 60.0)]
    patience: f64,
    /// Seconds that an engine may take for its first training step, compiling included [default: 75 on a GPU]
    #[arg(long, value_name = "SECONDS")]
    first_step: Option<f64>,
    /// Dropout of LoRA's input in all training steps
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    dropout: f32,
    /// Measure what is not fused, too, and say so
    #[arg(long)]
    allow_fallback: bool,
    /// The commit that was built, where git cannot say [default: git's]
    #[arg(long, value_name = "TEXT")]
    commit: Option<String>,
    /// Decides all inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Cli {
    pub fn run(&self) -> Result<ExitCode> {
        match &self.command {
            Task::Cpu(options) => options.run(DeviceName::Cpu),
            Task::Cuda(options) => options.run(DeviceName::Cuda),
            Task::Join { out, folders } => {
                let reports = folders.iter().map(|folder| compare::read(&folder.join("report.json")));
                let joined = reports.collect::<Result<Vec<_>>>()?.into_iter().reduce(Report::join);
                joined.map_or(Ok(ExitCode::FAILURE), |report| write(&report, out))
            }
            Task::Compare { first, second } => compare::run(first, second),
            Task::SeedMethod(options) => {
                let device = if options.device == "cuda" { DeviceName::Cuda } else { DeviceName::Cpu };
                seed_method::run(&options.parts.start("mlx", device)?, device, options.parts.threads(device))
            }
            Task::Engine { name } => {
                let library = match name.as_str() {
                    "ours" => Library::Ours,
                    "candle" => Library::Candle,
                    _ => return Err(Error::Engine(format!("no engine {name} in this program"))),
                };
                serve(library, BufReader::new(stdin()), stdout())?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Parts {
    /// On a GPU threads draw random weights, and are not measured.
    fn threads(&self, device: DeviceName) -> usize {
        let all = || std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        self.threads.unwrap_or_else(|| if device == DeviceName::Cpu { 2 } else { all() })
    }

    fn folder(&self) -> PathBuf {
        let built = Path::new(env!("CARGO_MANIFEST_DIR"));
        match &self.bench {
            Some(folder) => folder.clone(),
            None if Path::new("bench/cases").is_dir() => PathBuf::from("bench"),
            None => built.to_owned(),
        }
    }

    /// How to start an engine by its name.
    fn start(&self, name: &str, device: DeviceName) -> Result<Start> {
        let threads = self.threads(device).to_string();
        let variables = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"];
        let mut environment: Vec<_> =
            variables.iter().map(|&variable| (variable.to_owned(), threads.clone())).collect();
        for (variable, value) in [
            ("MIMALLOC_ARENA_EAGER_COMMIT", "0"),
            ("MIMALLOC_PURGE_DELAY", "-1"),
            ("MLX_ENABLE_TF32", "0"),
            ("PYTHONUNBUFFERED", "1"),
        ] {
            environment.push((variable.to_owned(), value.to_owned()));
        }
        let (program, arguments) = if matches!(name, "ours" | "candle") {
            let program = std::env::current_exe().map_err(Error::stream)?;
            (program, vec!["engine".to_owned(), name.to_owned()])
        } else {
            let script = self.folder().join("engines").join(format!("{name}_engine.py"));
            (self.python(), vec![script.display().to_string()])
        };
        Ok(Start { name: name.to_owned(), program, arguments, environment })
    }

    fn python(&self) -> PathBuf {
        let own = self.folder().join(".venv/bin/python");
        match &self.engine_python {
            Some(program) => program.clone(),
            None if own.is_file() => own,
            None => PathBuf::from("python3"),
        }
    }
}

impl Options {
    fn run(&self, device: DeviceName) -> Result<ExitCode> {
        let start = Instant::now();
        let threads = self.parts.threads(device);
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(if device == DeviceName::Cpu { threads } else { 0 })
            .build_global();
        let mut report = Report {
            device,
            command: std::iter::once("candlewick-bench".to_owned())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
            commit: self.commit.clone().unwrap_or_else(commit),
            machine: machine::facts(device),
            engines: Vec::new(),
            missing: std::collections::BTreeMap::new(),
            limits: std::collections::BTreeMap::new(),
            seconds: 0.0,
            left_out: 0,
            cases: Vec::new(),
            trainings: Vec::new(),
        };
        let scratch = self.scratch()?;
        let folder = self.out.clone().unwrap_or_else(|| Path::new("target/bench").join(device.name()));
        let mut contenders = Vec::new();
        for (name, started) in self.contenders(device) {
            match started {
                Ok(started) => {
                    report.engines.extend(started.first().map(|contender| contender.hello.clone()));
                    contenders.extend(started);
                }
                Err(error) => {
                    eprintln!("{name} did not start: {error}");
                    report.missing.insert(name, error.to_string());
                }
            }
        }
        let physics = physics(device, &mut contenders, &mut report)?;
        if !self.no_ops {
            let settings = Settings {
                device,
                threads,
                physics,
                scratch: scratch.path(),
                rounds: self.rounds,
                budget: Duration::from_secs_f64(self.budget.unwrap_or(match device {
                    DeviceName::Cpu => 1.2,
                    DeviceName::Cuda => 0.6,
                })),
                until: self.limit.map(|limit| start + Duration::from_secs_f64(limit)),
                allow_fallback: self.allow_fallback,
                compile: !self.small,
                seed: self.seed.wrapping_mul(1 << 20),
            };
            let chosen = self.cases(device)?;
            // What is done is on disk, whatever comes.
            let mut written = Instant::now();
            report.left_out = runner::run(&chosen, &mut contenders, &settings, |case| {
                println!("{}", case.line());
                report.cases.push(case);
                if written.elapsed() > Duration::from_secs(10) {
                    written = Instant::now();
                    report.seconds = start.elapsed().as_secs_f64();
                    save(&report, &folder)?;
                }
                Ok(())
            })?;
            save(&report, &folder)?;
        }
        drop(contenders);
        if !self.no_training {
            self.train(device, &physics, &mut report)?;
        }
        report.seconds = start.elapsed().as_secs_f64();
        write(&report, &folder)
    }

    /// The engines of operations, started side by side: most of a start is a library's loading.
    fn contenders(&self, device: DeviceName) -> Vec<(String, Result<Vec<Contender>>)> {
        let names = self.engines(device).into_iter().filter(|name| name != "peft");
        let start = |name: &str| {
            Contender::start_all(&self.parts.start(name, device)?, device, self.parts.threads(device))
        };
        std::thread::scope(|scope| {
            let starting: Vec<_> = names
                .map(|name| {
                    let of_name = name.clone();
                    (name, scope.spawn(move || start(&of_name)))
                })
                .collect();
            let ended = |_| Err(Error::Engine("its start broke off".to_owned()));
            starting.into_iter().map(|(name, started)| (name, started.join().unwrap_or_else(ended))).collect()
        })
    }

    fn engines(&self, device: DeviceName) -> Vec<String> {
        let all: &[&str] = match device {
            DeviceName::Cpu => &["ours", "candle", "pytorch", "mlx", "peft"],
            DeviceName::Cuda => &["ours", "candle", "pytorch", "mlx", "liger", "peft"],
        };
        if self.engines.is_empty() {
            all.iter().map(|&name| name.to_owned()).collect()
        } else {
            self.engines.clone()
        }
    }

    fn is_wanted(&self, id: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| id.contains(text))
    }

    fn cases(&self, device: DeviceName) -> Result<Vec<Chosen>> {
        let mut chosen = read(&self.parts.folder().join("cases"), device, self.small)?;
        for (_, cases) in chosen.iter_mut().flat_map(|file| &mut file.groups) {
            cases.retain(|case| self.is_wanted(&case.id()));
        }
        Ok(chosen)
    }

    fn train(&self, device: DeviceName, physics: &Physics, report: &mut Report) -> Result<()> {
        let engines = self.engines(device);
        let mut trainers = Vec::new();
        for (engine, variant) in trainers_of(device) {
            if engines.iter().any(|name| name == engine) {
                let label = if engine == variant { engine.to_owned() } else { format!("{engine} {variant}") };
                trainers.push(Trainer {
                    label,
                    variant: variant.to_owned(),
                    start: self.parts.start(engine, device)?,
                });
            }
        }
        let mut wanted = training::all(device);
        for training in &mut wanted {
            training.first_step_seconds = self.first_step.unwrap_or(training.first_step_seconds);
            training.dropout = self.dropout;
        }
        let mut paces = trainings::Pace::new();
        for training in wanted.iter().filter(|t| self.is_wanted(&t.id()) && (!self.small || t.is_small())) {
            let rounds = self.training_rounds.unwrap_or(training.processes);
            let threads = self.parts.threads(device);
            let how = trainings::How {
                device,
                threads,
                rounds,
                patience: self.patience,
                physics,
                allow_fallback: self.allow_fallback,
            };
            let (done, engines) = trainings::run(training, &trainers, &how, &mut paces);
            for outcome in &done.outcomes {
                let rate = outcome.tokens_per_second.unwrap_or(f64::NAN);
                let problem = outcome.problem.as_deref().unwrap_or("");
                let gib = outcome.peak_bytes.unwrap_or(f64::NAN) / 1_073_741_824.0;
                println!("{:24} {:16} {rate:10.1} tokens/s {gib:7.2} GiB {problem}", done.id, outcome.label);
            }
            report.meet(engines);
            report.trainings.push(done);
        }
        Ok(())
    }

    fn scratch(&self) -> Result<tempfile::TempDir> {
        let memory = Path::new("/dev/shm");
        let place = match &self.scratch {
            Some(folder) => folder.clone(),
            None if memory.is_dir() => memory.to_owned(),
            None => std::env::temp_dir(),
        };
        tempfile::tempdir_in(&place).map_err(|e| Error::at(&place, e))
    }
}

/// Writes the table, the data and the charts.
fn save(report: &Report, folder: &Path) -> Result<()> {
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|e| Error::at(&path, e))
    };
    std::fs::create_dir_all(folder).map_err(|e| Error::at(folder, e))?;
    let json = serde_json::to_string_pretty(report).map_err(|e| Error::Engine(e.to_string()))?;
    put("report.json", &json)?;
    put("table.md", &report.table())?;
    for (op, svg) in chart::by_op(report)? {
        put(&format!("{op}.svg"), &svg)?;
    }
    Ok(())
}

/// Saves and prints; fails if a time of ours does not count.
fn write(report: &Report, folder: &Path) -> Result<ExitCode> {
    save(report, folder)?;
    println!("{}", report.table());
    println!("Everything is in {} ({:.0} s)", folder.display(), report.seconds);
    let ours = report.problems().into_iter().filter(|(what, _)| what.contains(": ours"));
    let broken: Vec<String> = ours.map(|(what, problem)| format!("{what}: {problem}")).collect();
    for line in &broken {
        eprintln!("not counted: {line}");
    }
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Engines that train, with their variants, ours first.
fn trainers_of(device: DeviceName) -> Vec<(&'static str, &'static str)> {
    match device {
        DeviceName::Cpu => vec![("ours", "ours"), ("peft", "eager")],
        DeviceName::Cuda => {
            vec![("ours", "ours"), ("peft", "eager"), ("peft", "liger"), ("peft", "compiled")]
        }
    }
}

/// The device's rates: the copy by this program, or by our engine on a GPU; products by the fastest of all engines.
fn physics(device: DeviceName, contenders: &mut [Contender], report: &mut Report) -> Result<Physics> {
    let cache = machine::cache().unwrap_or(32 << 20);
    let mut physics = match device {
        DeviceName::Cpu => Physics {
            copy: limits::copy_rate(8 * cache),
            cached_copy: limits::copy_rate(32 << 10),
            cache_bytes: crate::ops::as_f64(cache),
            f32_products: 0.0,
            short_products: 0.0,
        },
        DeviceName::Cuda => Physics {
            copy: 0.0,
            cached_copy: 0.0,
            cache_bytes: 50.0 * 1_048_576.0,
            f32_products: 0.0,
            short_products: 0.0,
        },
    };
    let mut asked = Vec::new();
    for contender in contenders {
        if asked.contains(&contender.hello.engine) {
            continue;
        }
        asked.push(contender.hello.engine.clone());
        let limits = ask_limits(contender, device).unwrap_or_default();
        if let Some(copy) = limits.copy_bytes_per_second {
            physics.copy = physics.copy.max(copy);
        }
        for (dtype, rate) in limits.product_operations_per_second {
            let slot = if dtype == "f32" { &mut physics.f32_products } else { &mut physics.short_products };
            *slot = slot.max(rate);
        }
    }
    if device == DeviceName::Cuda {
        // The second-level cache is a few times faster than the memory.
        physics.cached_copy = 4.0 * physics.copy;
    }
    if physics.copy <= 0.0 || physics.f32_products <= 0.0 {
        return Err(Error::Engine("no engine measured the device's limits".to_owned()));
    }
    physics.short_products = physics.short_products.max(physics.f32_products);
    for (name, value) in [
        ("copy, GB/s (read and written)", physics.copy),
        ("copy within the cache, GB/s", physics.cached_copy),
        ("products in f32, GFLOP/s", physics.f32_products),
        ("products in 16 bits, GFLOP/s", physics.short_products),
    ] {
        report.limits.insert(name.to_owned(), value);
    }
    Ok(physics)
}

fn ask_limits(contender: &mut Contender, device: DeviceName) -> Result<Limits> {
    let settings = (device, contender.hello.threads);
    let session: &mut Session = contender.running(settings.0, settings.1)?;
    match session.ask(&Request::Limits)?.0 {
        Reply::Limits(limits) => Ok(limits),
        _ => Ok(Limits::default()),
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if !changes.is_empty() => format!("{commit} with changes"),
        _ => commit,
    }
}
