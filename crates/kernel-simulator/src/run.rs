//! From a plan to a run: binds the buffers, compiles the kernels, lets every thread of every launch run, and gives
//! the findings their names.

use crate::findings::Finding;
use crate::hooks;
use crate::machine::{Bound, Machine};
use crate::memory::{Contents, DeviceMemory, Initial};
use crate::module::Module;
use crate::report::{Kind, Report};
use crate::{Error, Simulator};
use candlewick_kernels::launch::{MAX_THREADS, VECTOR_BYTES};
use candlewick_kernels::{Launch, Plan, Role};
use std::fmt;
use std::sync::Arc;

/// What came of a plan.
#[derive(Clone, Debug)]
pub struct Run {
    /// The bytes of the plan's outputs, in the order of its buffers. Bytes that nobody wrote are `0xff`.
    pub outputs: Vec<Vec<u8>>,
    /// Every bug that was seen. Empty for a correct kernel.
    pub reports: Vec<Report>,
    /// Calls of the dialect's `fma`, over all threads of all launches.
    pub multiplications: u64,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.reports.is_empty() {
            return f.write_str("clean");
        }
        self.reports.iter().try_for_each(|report| writeln!(f, "{report}"))
    }
}

pub(crate) fn run(
    simulator: &Simulator,
    plan: &Plan,
    inputs: &[&[u8]],
    text: &dyn Fn(&Launch) -> String,
) -> Result<Run, Error> {
    let device = bind(plan, inputs, simulator.alignment)?;
    let mut modules = Vec::with_capacity(plan.launches.len());
    for launch in &plan.launches {
        let module = simulator.toolchain.module(&text(launch));
        modules.push(module.map_err(|log| Error::Compile { kernel: launch.kernel, log })?);
    }
    let threads = plan.launches.iter().map(|launch| launch.threads).max().unwrap_or(0);
    let mut machine = Machine::new(device, threads.min(MAX_THREADS), simulator.seed, simulator.step_limit);
    let mut reports = Vec::new();
    for (launch, module) in plan.launches.iter().zip(&modules) {
        let (after, findings) = run_launch(machine, plan, launch, module)?;
        machine = after;
        reports.extend(name(findings, launch, module));
        if machine.stopped {
            break;
        }
    }
    if !machine.stopped {
        reports.extend(unwritten(plan, &machine.device));
    }
    let outputs = plan.with_role(Role::Output).map(|(index, _)| machine.device.bytes(index).to_vec());
    Ok(Run { outputs: outputs.collect(), reports, multiplications: machine.multiplications })
}

/// Lays out the plan's buffers, with the given bytes in the inputs.
fn bind(plan: &Plan, inputs: &[&[u8]], alignment: usize) -> Result<DeviceMemory, Error> {
    let expected = plan.with_role(Role::Input).count();
    if inputs.len() != expected {
        return Err(Error::Input {
            what: "the inputs".into(),
            expected: expected.to_string(),
            got: inputs.len().to_string(),
        });
    }
    let mut given = inputs.iter();
    let mut buffers = Vec::with_capacity(plan.buffers.len());
    for buffer in &plan.buffers {
        let contents = match buffer.role {
            Role::Input => Contents::Given(given.next().copied().unwrap_or_default()),
            Role::Output | Role::Scratch => Contents::Nothing(buffer.bytes()),
        };
        if let Contents::Given(bytes) = contents
            && bytes.len() != buffer.bytes()
        {
            return Err(Error::Input {
                what: buffer.name.into(),
                expected: format!("{} bytes", buffer.bytes()),
                got: format!("{} bytes", bytes.len()),
            });
        }
        let alignment = if buffer.role == Role::Scratch { VECTOR_BYTES } else { alignment };
        buffers.push(Initial { name: buffer.name, contents, alignment });
    }
    Ok(DeviceMemory::new(&buffers))
}

/// Runs one launch. The machine comes back with what was found.
fn run_launch(
    mut machine: Machine,
    plan: &Plan,
    launch: &Launch,
    module: &Arc<Module>,
) -> Result<(Machine, Vec<Finding>), Error> {
    let mut wrong = Vec::new();
    if let Err(error) = launch.check(plan.buffers.len()) {
        wrong.push(error.to_string());
    } else {
        let kernel = module.kernel(launch.kernel).ok_or(Error::NoKernel(launch.kernel))?;
        wrong.extend(kernel.disagreements(launch));
        if wrong.is_empty() {
            let (params, mut arguments) = (words(&launch.params), Vec::new());
            arguments.extend(launch.arguments.iter().map(|&buffer| machine.device.address(buffer)));
            arguments.push(params.as_ptr().expose_provenance());
            let bound = Bound {
                entry: kernel.entry,
                arguments,
                params,
                threads: launch.threads,
                threadgroup_bytes: launch.threadgroup_bytes,
            };
            let grid = machine.begin_launch(bound, launch.threadgroups);
            machine = run_grid(machine, &grid);
        }
    }
    for detail in wrong {
        machine.findings.add(Finding::new(Kind::Limit, detail));
        machine.stopped = true;
    }
    let findings = machine.findings.take();
    Ok((machine, findings))
}

/// Runs the threadgroups one after the other: nothing orders them, so any order will do.
fn run_grid(machine: Machine, grid: &[[u32; 3]]) -> Machine {
    let outer = hooks::install(Some(machine));
    for &position in grid {
        hooks::with(|machine| machine.begin_threadgroup(position, hooks::run_thread));
        while let Some(thread) = hooks::with(Machine::next) {
            hooks::resume(thread);
        }
        if hooks::with(|machine| machine.stopped) {
            break;
        }
    }
    match hooks::install(outer) {
        Some(machine) => machine,
        None => unreachable!("the machine was installed above, and kernels cannot take it"),
    }
}

/// Parameter bytes at an address that suits their 32-bit fields.
fn words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks(4)
        .map(|chunk| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_ne_bytes(word)
        })
        .collect()
}

/// Gives findings the lines they come from.
fn name(findings: Vec<Finding>, launch: &Launch, module: &Module) -> impl Iterator<Item = Report> {
    let stacks: Vec<&[usize]> = findings.iter().map(|finding| finding.stack.as_slice()).collect();
    let sites = module.sites(&stacks);
    let kernel = launch.kernel;
    findings.into_iter().zip(sites).map(move |(finding, sites)| {
        let mut sites = sites.into_iter();
        Report {
            kind: finding.kind,
            kernel: kernel.to_owned(),
            site: sites.next(),
            callers: sites.collect(),
            buffer: finding.buffer,
            offset: finding.offset,
            thread: finding.thread,
            detail: finding.detail,
            count: finding.count,
        }
    })
}

/// Outputs that are not complete after the last launch.
fn unwritten(plan: &Plan, device: &DeviceMemory) -> Vec<Report> {
    let outputs = plan.with_role(Role::Output);
    let missing = outputs.filter_map(|(index, buffer)| {
        let (offset, bytes) = device.unwritten(index)?;
        Some(Report {
            kind: Kind::Unwritten,
            kernel: String::new(),
            site: None,
            callers: Vec::new(),
            buffer: Some(buffer.name.to_owned()),
            offset: i64::try_from(offset).ok(),
            thread: None,
            detail: format!("{bytes} of {} bytes", buffer.bytes()),
            count: 1,
        })
    });
    missing.collect()
}
