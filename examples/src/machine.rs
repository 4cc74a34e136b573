//! What a measurement has to name: machine, commit, memory, processor time.

use std::process::Command;
use std::time::Duration;

/// Processor, cores, memory and system.
pub fn describe() -> String {
    let system = sysinfo::System::new_all();
    let brand = system.cpus().first().map_or("unknown processor", |cpu| cpu.brand()).trim().to_owned();
    let (cores, gib) = (system.cpus().len(), system.total_memory() as f64 / f64::from(1 << 30));
    let os = sysinfo::System::long_os_version().unwrap_or_else(|| "unknown system".into());
    format!("{brand}, {cores} logical cores, {gib:.0} GiB, {os}")
}

/// The commit of the source tree in the working directory, `unknown` outside one.
pub fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let text = output.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    text.map_or_else(|| "unknown".into(), |t| t.trim().to_owned())
}

/// Resident memory of this process in MB, 0 where the system does not tell.
pub fn resident_mb() -> f64 {
    of_this_process(|process| process.memory() as f64 / 1e6)
}

/// Time that all cores together have worked for this process, 0 where the system does not tell.
pub fn processor_time() -> Duration {
    of_this_process(|process| Duration::from_millis(process.accumulated_cpu_time()))
}

fn of_this_process<T: Default>(figure: impl Fn(&sysinfo::Process) -> T) -> T {
    let Ok(pid) = sysinfo::get_current_pid() else { return T::default() };
    let mut system = sysinfo::System::new();
    system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), true);
    system.process(pid).map_or_else(T::default, figure)
}
