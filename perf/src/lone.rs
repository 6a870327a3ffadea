//! How soon a lone request is answered: one small event at a time, on one connection, to an idle durable server.
//!
//! By turns with an fdatasync of one sector that this tool does itself in the spool's directory, so that both meet the
//! same disk. The promise is a difference: an answer within 1 ms beyond one fdatasync.
//! Two files are synced: one whose sectors were written before, which is the least a sync can cost, and one whose space
//! is only allocated, where most file systems must also note that the sectors now hold something.
//! Not here: a busy server, where a request waits for the commit before its own; see `throughput`.

use crate::client::{Bounds, Client, ClientOptions, Outcome};
use crate::cpu::CpuPlan;
use crate::machine::Machine;
use crate::request::Request;
use crate::server::{self, Ack, Server, ServerOptions};
use crate::{SEED, ServerArguments};
use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use rustix::fs::{FallocateFlags, fallocate};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use weir_perf::event;

/// Beyond one fdatasync.
const PROMISE: Duration = Duration::from_millis(1);
const POOL: u64 = 1_024;
const SECTOR_SIZE: usize = 512;
/// Sectors of each file; they are written in turn.
const SECTOR_COUNT: u64 = 8_192;
/// Requests before the first that counts.
const WARM_UP: u64 = 50;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    server: ServerArguments,
    /// Requests, and as many syncs of each file
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    requests: u64,
    /// Pause before each request
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pause_ms: u64,
}

/// A file that is synced sector by sector.
struct SyncProbe {
    file: File,
    sector_next: u64,
    latency: Histogram<u64>,
}

impl SyncProbe {
    /// A file in `directory` whose space is allocated, and written to and synced as well where `is_written`.
    fn create(directory: &Path, is_written: bool) -> Result<SyncProbe> {
        let name = if is_written {
            "sync-written"
        } else {
            "sync-allocated"
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(directory.join(name))
            .context("a file to sync")?;
        let size = SECTOR_COUNT * SECTOR_SIZE as u64;
        match fallocate(&file, FallocateFlags::empty(), 0, size) {
            // What cannot be allocated is written, and then both files are the same.
            Ok(()) if !is_written => {}
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {
                file.write_all_at(&vec![0; size as usize], 0)
                    .context("filling the file to sync")?;
            }
            Err(error) => return Err(error).context("allocating the file to sync"),
        }
        file.sync_all().context("fsync")?;
        Ok(SyncProbe {
            file,
            sector_next: 0,
            latency: Outcome::new().latency,
        })
    }

    /// Writes a sector and syncs it.
    fn sync(&mut self) -> Result<()> {
        let offset = self.sector_next % SECTOR_COUNT * SECTOR_SIZE as u64;
        self.sector_next += 1;
        let begun_at = Instant::now();
        self.file
            .write_all_at(&[0x5a; SECTOR_SIZE], offset)
            .context("writing a sector")?;
        self.file.sync_data().context("fdatasync")?;
        let latency = begun_at.elapsed().as_nanos();
        self.latency
            .saturating_record(u64::try_from(latency).unwrap_or(u64::MAX));
        Ok(())
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let weir = server::binary_path(arguments.server.weir.as_deref())?;
    let cpus = CpuPlan::choose()?;
    let machine = Machine::describe();
    crate::note_shared_cpu(cpus);
    let requests: Vec<Request> = (0..POOL)
        .map(|index| Request::single(&event::small_event(SEED, index)))
        .collect();
    let options = ServerOptions::new(&arguments.server, Ack::Durable);
    let server = Server::start(&weir, cpus, &options)?;
    let client_options = ClientOptions {
        connection_count: 1,
        fresh_connections: false,
        check_answers: true,
        sources: Vec::new(),
        tls: None,
    };
    let mut client = Client::new(server.address(), &requests, client_options)?;
    let one = Bounds {
        request_count_max: 1,
        duration_max: ANSWER_TIMEOUT,
        in_flight_max: 1,
        rate: None,
    };
    // Beside the spool's directory and not in it: that is weir's.
    let directory = tempfile::Builder::new()
        .prefix("weir-perf-")
        .tempdir_in(server.spool().parent().unwrap_or(server.spool()))
        .context("a temporary directory beside the spool")?;
    let mut written = SyncProbe::create(directory.path(), true)?;
    let mut allocated = SyncProbe::create(directory.path(), false)?;

    let pause = Duration::from_millis(arguments.pause_ms);
    let mut total = Outcome::new();
    for index in 0..WARM_UP + arguments.requests {
        // The pause is what makes the server idle.
        std::thread::sleep(pause);
        let outcome = client.run(&one)?;
        outcome.require_success()?;
        if index >= WARM_UP {
            total.add(&outcome);
            written.sync()?;
            allocated.sync()?;
        }
    }
    let page = server.metrics()?;
    drop(client);
    drop(directory);
    server.stop()?;
    let commits = server::Commits::of(&page)?;

    let rows = [
        ("answer", &total.latency),
        ("fdatasync, sectors written before", &written.latency),
        ("fdatasync, space only allocated", &allocated.latency),
    ];
    println!(
        "{:<36}{:>10}{:>10}{:>10}",
        format!("us, of {} each", arguments.requests),
        "p50",
        "p99",
        "max"
    );
    for (name, latency) in rows {
        println!(
            "{name:<36}{:>10.0}{:>10.0}{:>10.0}",
            us(latency.value_at_quantile(0.50)),
            us(latency.value_at_quantile(0.99)),
            us(latency.max())
        );
    }
    println!(
        "weir itself: {:.2} commits per request, {:.0} us each",
        commits.count / (WARM_UP + arguments.requests) as f64,
        commits.mean_us()
    );
    let promised = |quantile: f64| {
        let sync = written.latency.value_at_quantile(quantile);
        total.latency.value_at_quantile(quantile) <= sync + PROMISE.as_nanos() as u64
    };
    let passes = promised(0.50) && promised(0.99);
    println!(
        "p50 and p99 within {} ms of one fdatasync's: {}",
        PROMISE.as_millis(),
        if passes { "PASS" } else { "FAIL" }
    );
    let line = json!({
        "measurement": "lone",
        "machine": machine.to_json(),
        "level": arguments.server.level,
        "requests": arguments.requests,
        "pause_ms": arguments.pause_ms,
        "answer_us": to_json(&total.latency),
        "fdatasync_written_us": to_json(&written.latency),
        "fdatasync_allocated_us": to_json(&allocated.latency),
        "commit_us_mean": commits.mean_us(),
        "pass": passes,
    });
    println!("{line}");
    Ok(())
}

fn us(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn to_json(latency: &Histogram<u64>) -> serde_json::Value {
    json!({
        "p50": us(latency.value_at_quantile(0.50)),
        "p99": us(latency.value_at_quantile(0.99)),
        "max": us(latency.max()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_files_have_their_space_and_count_their_syncs() {
        let directory = tempfile::tempdir().expect("a directory");
        for is_written in [true, false] {
            let mut probe = SyncProbe::create(directory.path(), is_written).expect("made");
            for _ in 0..3 {
                probe.sync().expect("synced");
            }
            assert_eq!(probe.latency.len(), 3);
            let size = probe.file.metadata().expect("open").len();
            assert_eq!(size, SECTOR_COUNT * SECTOR_SIZE as u64);
        }
    }
}
