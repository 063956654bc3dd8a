//! What the machine is, as found: nothing is changed.

use std::collections::BTreeMap;
use std::fs::read_to_string;
use std::process::Command;

use crate::case::DeviceName;

/// Facts by name.
pub type Facts = BTreeMap<String, String>;

/// The facts of this machine.
pub fn facts(device: DeviceName) -> Facts {
    let mut facts = Facts::new();
    let mut put = |name: &str, value: Option<String>| {
        facts.insert(name.to_owned(), value.unwrap_or_else(|| "not told".to_owned()));
    };
    let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    put("system", Some(format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)));
    put("kernel", trimmed("/proc/sys/kernel/osrelease"));
    put(
        "processor",
        field("model name").map(|name| {
            let id = [("family", "cpu family"), ("model", "model\t"), ("stepping", "stepping")];
            let id = id.map(|(label, key)| format!("{label} {}", field(key).unwrap_or_default()));
            format!("{name} ({})", id.join(", "))
        }),
    );
    put("cores", std::thread::available_parallelism().ok().map(|n| n.to_string()));
    let interesting =
        ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16"];
    put(
        "vector units",
        field("flags").or_else(|| field("Features")).map(|flags| {
            let flags: Vec<_> = flags.split(' ').filter(|flag| interesting.contains(flag)).collect();
            flags.join(" ")
        }),
    );
    let frequency = "/sys/devices/system/cpu/cpu0/cpufreq/";
    put("governor", trimmed(&format!("{frequency}scaling_governor")));
    put("clock", field("cpu MHz").map(|mhz| format!("{mhz} MHz at the start")));
    put("last cache", cache().map(|bytes| format!("{} MiB", bytes >> 20)));
    put(
        "memory",
        read_to_string("/proc/meminfo")
            .ok()
            .and_then(|info| Some(info.lines().next()?.split_once(':')?.1.trim().to_owned())),
    );
    put("pages", trimmed("/sys/kernel/mm/transparent_hugepage/enabled"));
    put("load at the start", trimmed("/proc/loadavg"));
    if device == DeviceName::Cuda {
        let query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit";
        put("gpu", output("nvidia-smi", &[&format!("--query-gpu={query}"), "--format=csv,noheader"]));
    }
    facts
}

/// More processors than this that are busy with something else disturb a measurement: two threads that wait for each
/// other lose far more than the share that is taken.
pub const DISTURBANCE: f64 = 0.15;

/// What all processors and some processes have worked so far, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    all: f64,
    own: f64,
}

impl Work {
    /// As the kernel counts it; `None` where it does not.
    pub fn now(processes: &[u32]) -> Option<Self> {
        // Linux counts in hundredths of a second.
        let seconds = |field: &str| field.parse::<f64>().ok().map(|ticks| ticks / 100.0);
        let stat = read_to_string("/proc/stat").ok()?;
        let allowed = allowed_processors()?;
        let mut all = 0.0;
        for line in stat.lines() {
            let mut fields = line.split_whitespace();
            let number = fields.next().and_then(|name| name.strip_prefix("cpu")?.parse::<usize>().ok());
            if number.is_some_and(|number| allowed.iter().any(|range| range.contains(&number))) {
                let fields: Vec<f64> = fields.filter_map(seconds).collect();
                // user, nice, system, idle, iowait, irq, softirq, steal: all but the two in which nobody worked.
                all += fields.iter().take(8).sum::<f64>() - fields.get(3)? - fields.get(4)?;
            }
        }
        let mut own = 0.0;
        for process in processes {
            let stat = read_to_string(format!("/proc/{process}/stat")).ok()?;
            let after_name = stat.rsplit_once(')')?.1;
            own += after_name.split_whitespace().skip(11).take(2).filter_map(seconds).sum::<f64>();
        }
        Some(Self { all, own })
    }

    /// Processors that others kept busy between two looks, of the wall seconds between them.
    pub fn others(self, later: Self, wall: f64) -> f64 {
        ((later.all - self.all) - (later.own - self.own)) / wall
    }
}

/// The numbers of the processors that this process may run on: all, or what `taskset` left.
fn allowed_processors() -> Option<Vec<std::ops::RangeInclusive<usize>>> {
    let status = read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').map(range).collect()
}

/// Bytes of the last cache of the first core.
pub fn cache() -> Option<usize> {
    let size = |index: usize| {
        let text = trimmed(&format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size"))?;
        Some(text.strip_suffix('K')?.parse::<usize>().ok()? << 10)
    };
    (0..5).filter_map(size).max()
}

fn trimmed(path: &str) -> Option<String> {
    Some(read_to_string(path).ok()?.trim().to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
