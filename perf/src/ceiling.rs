//! What the client can do on this machine, so that a rate of the server is not mistaken for the client's.
//!
//! The stand-in takes the server's CPU and answers at once. It works about as hard as the client per request, so
//! the rates here are a lower bound of what the client can drive.

use crate::SEED;
use crate::answerer::{Answerer, CREATED};
use crate::client::{Bounds, Client, ClientOptions};
use crate::cpu::{self, CpuPlan};
use crate::machine::Machine;
use crate::request::Request;
use anyhow::{Result, ensure};
use serde_json::json;
use std::time::Duration;
use weir_perf::event;

#[derive(clap::Args)]
pub struct Arguments {
    /// Measured time per case
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Kept-alive connections [default: 64 for small, 16 for large requests]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    connections: Option<u16>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    cpu::pin(cpus.client)?;
    println!(
        "{:<8}{:>12}{:>10}{:>21}{:>10}{:>10}",
        "case", "requests/s", "MB/s", "client CPU us/req", "p50 us", "p99 us"
    );
    let small: Vec<Request> = (0..1_024)
        .map(|index| Request::single(&event::small_event(SEED, index)))
        .collect();
    let large: Vec<Request> = (0..128)
        .map(|index| Request::single(&event::large_event(SEED, index)))
        .collect();
    let mut cases = Vec::new();
    for (case, requests, connections) in [("small", &small, 64), ("large", &large, 16)] {
        let server = Answerer::start(Some(cpus.server), |_| CREATED.to_vec())?;
        let options = ClientOptions {
            connection_count: usize::from(arguments.connections.unwrap_or(connections)),
            fresh_connections: false,
            check_answers: true,
            sources: Vec::new(),
            tls: None,
        };
        let mut client = Client::new(server.address(), requests, options)?;
        let bounds = Bounds::for_duration(Duration::from_secs(arguments.seconds));
        // This thread is the client and nothing else.
        let cpu_before = cpu::thread_time();
        let outcome = client.run(&bounds)?;
        let cpu_time = cpu::thread_time().saturating_sub(cpu_before);
        outcome.require_success()?;
        drop(client);
        let seen = server.stop();
        ensure!(
            (seen.requests, seen.body_bytes) == (outcome.answered, outcome.body_bytes),
            "the stand-in saw other requests than were sent"
        );
        let seconds = outcome.elapsed.as_secs_f64();
        let rate = outcome.answered as f64 / seconds;
        let cpu_us = cpu_time.as_secs_f64() / outcome.answered as f64 * 1e6;
        println!(
            "{case:<8}{rate:>12.0}{:>10.1}{cpu_us:>21.2}{:>10.0}{:>10.0}",
            outcome.body_bytes as f64 / seconds / 1e6,
            outcome.latency.value_at_quantile(0.50) as f64 / 1e3,
            outcome.latency.value_at_quantile(0.99) as f64 / 1e3,
        );
        cases.push(json!({
            "case": case,
            "requests_per_second": rate,
            "client_cpu_us": cpu_us,
        }));
    }
    let line = json!({
        "measurement": "ceiling",
        "machine": machine.to_json(),
        "cases": cases,
    });
    println!("{line}");
    Ok(())
}
