//! One server with its client, measured in rounds: what `throughput`, `compare` and others put beside each other.
//!
//! Servers that are compared run at the same time and take turns, so that a machine that slows down for a moment slows
//! all of them; each round gives a quotient of its own, and the median of those is what is reported.
//! Lives on the measuring thread, which is pinned to the client's CPU.
//!
//! Invariant: every request of every round was answered 2xx with the right body, or there is no number.
//! Not here: which servers are compared, and what is said about it.

use crate::client::{Bounds, Client, ClientOptions, Outcome};
use crate::client_http2::Http2Client;
use crate::cpu::{self, CpuPlan};
use crate::request::Request;
use crate::server::{Server, ServerOptions};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Duration;
use weir_perf::child;

/// Before the first round, per server.
const WARM_UP: Duration = Duration::from_millis(300);

/// What sends the requests.
enum Driver<'a> {
    Http1(Client<'a>),
    Http2(Http2Client),
}

/// How a client speaks to its server.
pub enum Speech {
    /// Kept-alive connections, one request at a time on each.
    Http1 { connection_count: usize },
    /// One connection.
    Http2 { stream_count: usize },
}

impl Driver<'_> {
    fn run(&mut self, duration: Duration) -> Result<Outcome> {
        match self {
            Driver::Http1(client) => client.run(&Bounds::for_duration(duration)),
            Driver::Http2(client) => client.run(duration),
        }
    }
}

/// A server with its client, and what came of all its rounds.
pub struct Side<'a> {
    pub server: Server,
    driver: Driver<'a>,
    pub total: Outcome,
    warm_up_answered: u64,
    cpu: Duration,
    client_cpu: Duration,
    pub rounds: Vec<Round>,
    pub rss_max: u64,
}

#[derive(Clone, Copy)]
pub struct Round {
    pub seconds_per_request: f64,
    pub cpu_seconds_per_request: f64,
}

impl<'a> Side<'a> {
    /// Starts `weir`, opens as many connections, and lets both warm up.
    pub fn start(
        weir: &Path,
        cpus: CpuPlan,
        options: &ServerOptions,
        connection_count: usize,
        requests: &'a [Request],
    ) -> Result<Self> {
        let speech = Speech::Http1 { connection_count };
        Side::start_speaking(weir, cpus, options, speech, requests)
    }

    /// The same, over TLS where the server speaks it.
    pub fn start_speaking(
        weir: &Path,
        cpus: CpuPlan,
        options: &ServerOptions,
        speech: Speech,
        requests: &'a [Request],
    ) -> Result<Self> {
        let server = Server::start(weir, cpus, options)?;
        let tls = |protocol| {
            let identity = options.tls.as_ref();
            identity
                .map(|identity| identity.client(protocol))
                .transpose()
        };
        let mut driver = match speech {
            Speech::Http1 { connection_count } => {
                let client_options = ClientOptions {
                    connection_count,
                    fresh_connections: false,
                    check_answers: !options.floor_receive,
                    sources: Vec::new(),
                    tls: tls("http/1.1")?,
                };
                Driver::Http1(Client::new(server.address(), requests, client_options)?)
            }
            Speech::Http2 { stream_count } => Driver::Http2(Http2Client::connect(
                server.address(),
                requests,
                stream_count,
                tls("h2")?,
            )?),
        };
        let warm_up = driver.run(WARM_UP)?;
        warm_up.require_success().context("warming up")?;
        Ok(Side {
            server,
            driver,
            total: Outcome::new(),
            warm_up_answered: warm_up.answered,
            cpu: Duration::ZERO,
            client_cpu: Duration::ZERO,
            rounds: Vec::new(),
            rss_max: 0,
        })
    }

    pub fn round(&mut self, duration: Duration) -> Result<Round> {
        let before = self.server.sample()?;
        let client_before = cpu::thread_time();
        let outcome = self.driver.run(duration)?;
        let client_cpu = cpu::thread_time().saturating_sub(client_before);
        let after = self.server.sample()?;
        outcome.require_success()?;
        let cpu = after.cpu.saturating_sub(before.cpu);
        let round = Round {
            seconds_per_request: outcome.elapsed.as_secs_f64() / outcome.answered as f64,
            cpu_seconds_per_request: cpu.as_secs_f64() / outcome.answered as f64,
        };
        self.total.add(&outcome);
        self.cpu += cpu;
        self.client_cpu += client_cpu;
        self.rounds.push(round);
        self.rss_max = self.rss_max.max(after.rss_bytes);
        Ok(round)
    }

    /// Requests per second over all rounds.
    pub fn rate(&self) -> f64 {
        self.total.answered as f64 / self.total.elapsed.as_secs_f64()
    }

    pub fn latency(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.total.latency.value_at_quantile(quantile))
    }

    /// The server's CPU time as a share of the elapsed time.
    pub fn cpu_share(&self) -> f64 {
        self.cpu.as_secs_f64() / self.total.elapsed.as_secs_f64()
    }

    /// That of the client.
    pub fn client_cpu_share(&self) -> f64 {
        self.client_cpu.as_secs_f64() / self.total.elapsed.as_secs_f64()
    }

    /// The server must have counted as accepted exactly what the client saw answered.
    pub fn check_accepted(&self, notes: &mut Vec<String>) -> Result<()> {
        let page = self.server.metrics()?;
        match child::metric_sum(&page, "weir_requests", "outcome=\"accepted\"") {
            None => {
                notes.push("no count of accepted requests in /metrics to compare with".to_owned());
            }
            Some(counted) => {
                let answered = self.total.succeeded() + self.warm_up_answered;
                ensure!(
                    counted == answered as f64,
                    "the server counts {counted} accepted requests, but answered {answered}"
                );
            }
        }
        Ok(())
    }

    /// Closes the connections, and then ends the server, which has nothing to wait for any more.
    pub fn stop(self) -> Result<()> {
        drop(self.driver);
        self.server.stop()
    }
}

pub fn median_of(rounds: &[Round], value: impl Fn(&Round) -> f64) -> f64 {
    median(&mut rounds.iter().map(value).collect::<Vec<_>>())
}

/// The middle value of an odd number of values.
pub fn median(values: &mut [f64]) -> f64 {
    assert!(values.len() % 2 == 1, "an odd number of rounds");
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_one_slow_round() {
        assert_eq!(median(&mut [1.0, 9.0, 1.5, 1.2, 1.1]), 1.2);
        assert_eq!(median(&mut [3.0]), 3.0);
    }
}
