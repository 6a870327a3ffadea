//! What the kernel says about a process: resident memory, CPU time, the CPUs its threads may use.
//!
//! Used by `server`; reads /proc, allocates little, on the measuring thread and between runs only.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::time::Duration;

/// A process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub rss_bytes: u64,
    /// User and system time of all threads so far, in steps of a clock tick.
    pub cpu: Duration,
}

pub fn sample(pid: u32) -> Result<Sample> {
    let status = read(pid, "status")?;
    let stat = read(pid, "stat")?;
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    let state = state(&stat).context("no state in /proc/PID/stat")?;
    ensure!(state != 'Z', "process {pid} has ended");
    Ok(Sample {
        rss_bytes: resident_bytes(&status).context("no VmRSS in /proc/PID/status")?,
        cpu: cpu_time(&stat, ticks_per_second).context("no CPU time in /proc/PID/stat")?,
    })
}

/// Names of threads that may run on another CPU than `cpu`.
pub fn threads_elsewhere(pid: u32, cpu: usize) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let tasks = format!("/proc/{pid}/task");
    for entry in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let path = entry?.path().join("status");
        // A thread that ended meanwhile runs nowhere.
        let Ok(status) = fs::read_to_string(path) else {
            continue;
        };
        if field(&status, "Cpus_allowed_list:") != Some(cpu.to_string().as_str()) {
            names.push(field(&status, "Name:").unwrap_or("unnamed").to_owned());
        }
    }
    Ok(names)
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("{path} (has the process ended?)"))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

fn resident_bytes(status: &str) -> Option<u64> {
    let kibibytes: u64 = field(status, "VmRSS:")?
        .strip_suffix("kB")?
        .trim()
        .parse()
        .ok()?;
    Some(kibibytes * 1024)
}

/// The fields from the state on; the command name before them may hold blanks and parentheses.
fn fields_after_name(stat: &str) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace())
}

fn state(stat: &str) -> Option<char> {
    fields_after_name(stat)?.next()?.chars().next()
}

/// utime and stime, fields 14 and 15 of proc_pid_stat(5); the state is field 3.
fn cpu_time(stat: &str, ticks_per_second: u64) -> Option<Duration> {
    let mut fields = fields_after_name(stat)?.skip(14 - 3);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_secs_f64(
        (user + system) as f64 / ticks_per_second as f64,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str =
        "Name:\tweir\nVmHWM:\t   70000 kB\nVmRSS:\t   65432 kB\nCpus_allowed_list:\t0\n";
    const STAT: &str =
        "4711 (a) (b c) S 1 4711 4711 0 -1 4194304 900 0 3 0 250 125 0 0 20 0 3 0 99 0 0";

    #[test]
    fn memory_time_and_state_are_found() {
        assert_eq!(resident_bytes(STATUS), Some(65_432 * 1024));
        assert_eq!(cpu_time(STAT, 100), Some(Duration::from_millis(3_750)));
        assert_eq!(state(STAT), Some('S'));
        assert_eq!(field(STATUS, "Cpus_allowed_list:"), Some("0"));
    }

    #[test]
    fn what_is_missing_is_not_zero() {
        assert_eq!(resident_bytes("Name:\tweir\n"), None);
        assert_eq!(resident_bytes("VmRSS:\t12 MB\n"), None);
        assert_eq!(cpu_time("4711 (weir) S 1", 100), None);
        assert_eq!(cpu_time("", 100), None);
    }

    #[test]
    fn this_process_has_memory_and_threads() {
        let pid = std::process::id();
        assert!(sample(pid).expect("readable").rss_bytes > 0);
        assert!(
            !threads_elsewhere(pid, usize::MAX)
                .expect("readable")
                .is_empty()
        );
    }
}
