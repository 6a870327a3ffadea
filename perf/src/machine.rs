//! The machine a number belongs to: without it a record of a run says nothing.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

pub struct Machine {
    pub cpu_model: String,
    pub cpu_count: usize,
    pub kernel: String,
    pub date: String,
}

impl Machine {
    pub fn describe() -> Self {
        let system = rustix::system::uname();
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs());
        Machine {
            cpu_model: cpu_model(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: format!(
                "{} {} {}",
                system.sysname().to_string_lossy(),
                system.release().to_string_lossy(),
                system.machine().to_string_lossy()
            ),
            date: format!("{}Z", weir_perf::event::timestamp_utc(seconds)),
        }
    }

    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "cpu_model": self.cpu_model,
            "cpu_count": self.cpu_count,
            "kernel": self.kernel,
            "date": self.date,
        })
    }
}

fn cpu_model(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == "model name")
        .map_or_else(
            || "unknown".to_owned(),
            |(_, value)| value.trim().to_owned(),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_found_or_unknown() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nprocessor\t: 1\n";
        assert_eq!(cpu_model(cpuinfo), "Fast CPU @ 3 GHz");
        assert_eq!(cpu_model(""), "unknown");
    }
}
