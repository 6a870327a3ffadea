//! What durability makes of a throughput: the server that answers when rows are synced, beside the one that does not wait.
//!
//! `throughput` measures both in the same rounds and puts the numbers here; here they become a table and JSON.
//! Not here: measuring.

use crate::MIB;
use crate::server::Commits;
use serde_json::json;
use std::time::Duration;

/// The durable server in one case.
pub struct Durable {
    pub requests: u64,
    pub requests_per_second: f64,
    /// Durable requests per second as a part of those answered from memory: the median of the rounds' own quotients.
    pub ratio: f64,
    /// The same for requests per second of CPU time.
    pub ratio_cpu: f64,
    /// CPU seconds per request, the median of the rounds.
    pub cpu: f64,
    pub cpu_share: f64,
    pub latency_p50: Duration,
    pub latency_p99: Duration,
    /// Of the measured rounds, the warm-up left out.
    pub commits: Commits,
    pub commits_per_second: f64,
    pub rss_max: u64,
}

/// A line of the tables.
pub struct Comparison<'a> {
    pub case: &'static str,
    pub memory_requests_per_second: f64,
    pub memory_latency_p50: Duration,
    pub memory_latency_p99: Duration,
    pub durable: &'a Durable,
}

impl Durable {
    fn requests_per_commit(&self) -> f64 {
        self.requests as f64 / self.commits.count
    }

    pub fn to_json(&self) -> serde_json::Value {
        json!({
            "requests": self.requests,
            "requests_per_second": self.requests_per_second,
            "ratio": self.ratio,
            "ratio_cpu": self.ratio_cpu,
            "cpu_us": self.cpu * 1e6,
            "cpu_share": self.cpu_share,
            "latency_p50_us": us(self.latency_p50),
            "latency_p99_us": us(self.latency_p99),
            "commits_per_second": self.commits_per_second,
            "requests_per_commit": self.requests_per_commit(),
            "commit_us": self.commits.mean_us(),
            "bytes_per_commit": self.commits.mean_bytes(),
            "rss_bytes_max": self.rss_max,
        })
    }
}

fn us(latency: Duration) -> f64 {
    latency.as_secs_f64() * 1e6
}

/// Both modes side by side, and what the commits were like.
pub fn print_tables(comparisons: &[Comparison<'_>]) {
    println!();
    println!(
        "{:<15}{:>12}{:>12}{:>8}{:>12}{:>8}{:>18}{:>18}",
        "requests/s", "memory", "durable", "ratio", "ratio (CPU)", "CPU %", "p50 us", "p99 us"
    );
    for comparison in comparisons {
        let durable = comparison.durable;
        let both = |memory, durable| format!("{:.0} / {:.0}", us(memory), us(durable));
        println!(
            "{:<15}{:>12.0}{:>12.0}{:>8.2}{:>12.2}{:>8.0}{:>18}{:>18}",
            comparison.case,
            comparison.memory_requests_per_second,
            durable.requests_per_second,
            durable.ratio,
            durable.ratio_cpu,
            durable.cpu_share * 100.0,
            both(comparison.memory_latency_p50, durable.latency_p50),
            both(comparison.memory_latency_p99, durable.latency_p99),
        );
    }
    println!();
    println!(
        "{:<15}{:>12}{:>16}{:>12}{:>14}{:>9}",
        "commits", "commits/s", "requests each", "us each", "bytes each", "RSS MiB"
    );
    for Comparison { case, durable, .. } in comparisons {
        println!(
            "{case:<15}{:>12.0}{:>16.1}{:>12.0}{:>14.0}{:>9.1}",
            durable.commits_per_second,
            durable.requests_per_commit(),
            durable.commits.mean_us(),
            durable.commits.mean_bytes(),
            durable.rss_max as f64 / MIB
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_told_per_commit_and_per_request() {
        let durable = Durable {
            requests: 600,
            requests_per_second: 300.0,
            ratio: 0.8,
            ratio_cpu: 0.9,
            cpu: 1e-5,
            cpu_share: 0.5,
            latency_p50: Duration::from_micros(700),
            latency_p99: Duration::from_micros(900),
            commits: Commits {
                count: 200.0,
                bytes: 204_800.0,
                microseconds: 80_000.0,
            },
            commits_per_second: 100.0,
            rss_max: 1,
        };
        let json = durable.to_json();
        assert_eq!(json["requests_per_commit"], 3.0);
        assert_eq!(json["bytes_per_commit"], 1_024.0);
        assert_eq!(json["commit_us"], 400.0);
        assert_eq!(json["latency_p50_us"], 700.0);
    }
}
