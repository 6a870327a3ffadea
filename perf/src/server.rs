//! The server under test: the release binary as a child, pinned to its CPU, with a configuration of ours.
//!
//! Starts before a case and ends after it; `client` sends to its address, `process` reads its counters.
//! Lives on the measuring thread; allocates at start and stop.
//!
//! Invariant: its directory is its own, and gone when the value is.
//! Not here: the child itself ([`weir_perf::child`]), and what the server does with events.

use crate::cpu::{self, CpuPlan};
use crate::process::{self, Sample};
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use weir_perf::child::{Weir, free_address};

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// What a case may change about the server.
#[derive(Clone)]
pub struct ServerOptions {
    pub level: u8,
    /// Receive each body and answer without looking at it: floor A.
    pub floor_receive: bool,
    /// `limits.connections`, where the default is too small.
    pub connections_max: Option<usize>,
}

pub struct Server {
    weir: Weir,
    address: SocketAddr,
    admin: SocketAddr,
    /// Holds the configuration and the log.
    _directory: TempDir,
}

impl Server {
    /// Starts `weir`, and returns once it accepts connections.
    pub fn start(weir: &Path, cpus: CpuPlan, options: &ServerOptions) -> Result<Server> {
        let directory = tempfile::Builder::new()
            .prefix("weir-perf-")
            .tempdir()
            .context("a temporary directory")?;
        let admin = free_address()?;
        fs::write(
            directory.path().join("weir.toml"),
            config_text(admin, options),
        )
        .context("writing the configuration")?;
        let more: &[&str] = if options.floor_receive {
            &["--floor-receive"]
        } else {
            &[]
        };
        // The child inherits this thread's affinity.
        cpu::pin(cpus.server)?;
        let spawned = Weir::spawn(weir, directory.path(), more);
        cpu::pin(cpus.client)?;
        let mut weir = spawned?;
        let address = weir.listening(START_TIMEOUT)?;
        Ok(Server {
            weir,
            address,
            admin,
            _directory: directory,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Memory and CPU time now. An error if the server has ended.
    pub fn sample(&self) -> Result<Sample> {
        process::sample(self.weir.pid())
            .with_context(|| format!("the server died{}", self.weir.log_tail()))
    }

    /// Names of its threads that are not confined to `cpu`.
    pub fn threads_elsewhere(&self, cpu: usize) -> Result<Vec<String>> {
        process::threads_elsewhere(self.weir.pid(), cpu)
    }

    /// The metrics page, as text.
    pub fn metrics(&self) -> Result<String> {
        weir_perf::child::metrics(self.admin)
    }

    /// Asks it to end and waits for it. An error if it does not, or says that it failed.
    pub fn stop(self) -> Result<()> {
        self.weir.stop()
    }
}

/// The binary to measure: the one named, or the one beside this program.
pub fn binary_path(named: Option<&Path>) -> Result<PathBuf> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .context("the path of this program")?
            .with_file_name("weir"),
    };
    // Absolute, because the server gets a working directory of its own.
    match fs::canonicalize(&path) {
        Ok(path) if path.is_file() => Ok(path),
        _ => bail!(
            "{} is not there: run `cargo build --release` first, or name the binary with --weir PATH",
            path.display()
        ),
    }
}

fn config_text(admin: SocketAddr, options: &ServerOptions) -> String {
    let mut text = format!(
        r#"cores = 1

[[listener]]
address = "127.0.0.1:0"

[admin]
address = "{admin}"

[destination]
type = "null"

[compression]
level = {}

[[route]]
path = "/*"
database = "Telemetry"
table = "Events"
"#,
        options.level
    );
    if let Some(connections) = options.connections_max {
        text.push_str(&format!("\n[limits]\nconnections = {connections}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: ServerOptions = ServerOptions {
        level: 2,
        floor_receive: false,
        connections_max: None,
    };

    #[test]
    fn the_configuration_is_what_the_floors_are_compared_with() {
        let admin = "127.0.0.1:4711".parse().expect("an address");
        let text = config_text(admin, &OPTIONS);
        for part in [
            "cores = 1\n",
            "address = \"127.0.0.1:0\"\n",
            "[admin]\naddress = \"127.0.0.1:4711\"\n",
            "type = \"null\"\n",
            "level = 2\n",
            "path = \"/*\"\ndatabase = \"Telemetry\"\ntable = \"Events\"\n",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert!(!text.contains("[limits]"));
        let options = ServerOptions {
            connections_max: Some(10_100),
            ..OPTIONS
        };
        assert!(config_text(admin, &options).ends_with("[limits]\nconnections = 10100\n"));
    }

    #[test]
    fn a_binary_that_is_not_there_is_explained() {
        let error = binary_path(Some(Path::new("no-such-binary"))).expect_err("absent");
        assert!(error.to_string().contains("cargo build --release"));
    }

    #[test]
    fn a_child_that_cannot_run_reports_its_log_and_is_gone() {
        // `false run --config …` says nothing and fails: the shortest server that does not start.
        let Some(program) = ["/bin/false", "/usr/bin/false"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.is_file())
        else {
            return;
        };
        let error = std::thread::spawn(move || {
            let cpus = CpuPlan::choose().expect("a CPU");
            Server::start(program, cpus, &OPTIONS)
                .err()
                .map(|error| error.to_string())
        })
        .join()
        .expect("no panic");
        assert_eq!(
            error.as_deref(),
            Some("the server did not start: it ended at once")
        );
    }
}
