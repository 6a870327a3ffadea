//! The server under test: the release binary as a child, pinned to its CPU, with a configuration of ours.
//!
//! Starts before a case and ends after it; `client` sends to its address, `process` reads its counters.
//! Lives on the measuring thread; allocates at start and stop.
//!
//! Invariant: its directory is its own, and gone when the value is.
//! Not here: the child itself ([`weir_perf::child`]), and what the server does with events.

use crate::ServerArguments;
use crate::cpu::{self, CpuPlan};
use crate::process::{self, Sample};
use crate::transport::Identity;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;
use weir_perf::child::{Weir, free_address, metric_sum};

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// What a success answer promises; a route's `ack`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ack {
    /// The rows are in memory: what receiving, checking and compressing cost
    Memory,
    /// The rows are in the spool, and synced
    Durable,
}

impl Ack {
    pub fn name(self) -> &'static str {
        match self {
            Ack::Memory => "memory",
            Ack::Durable => "durable",
        }
    }
}

/// Where the server's batches go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlainDestination {
    /// Discarded after compression
    Null,
    /// Written below the server's temporary directory, which must have the space
    Directory,
}

/// What the server is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    Plain(PlainDestination),
    /// The `[destination]` of a stand-in for Kusto.
    Kusto(String),
}

/// What a case may change about the server.
#[derive(Clone)]
pub struct ServerOptions {
    pub level: u8,
    pub ack: Ack,
    pub destination: Destination,
    /// `spool.size`.
    pub spool_size: String,
    /// Where the spool's directory is made; beside the server's configuration unless said.
    pub spool_parent: Option<PathBuf>,
    /// Receive each body and answer without looking at it: floor A.
    pub floor_receive: bool,
    /// `limits.connections`, where the default is too small.
    pub connections_max: Option<usize>,
    /// Let all but its reactor use the client's CPU too, as on a machine with more CPUs than reactors.
    pub uplink_apart: bool,
    /// Connections come from so many addresses that the default of `limits.connections_per_address` does.
    pub is_spread: bool,
    /// `deadlines.idle`, where the default is too short.
    pub idle: Option<&'static str>,
    /// With it, the listener speaks TLS.
    pub tls: Option<Identity>,
    /// The listener speaks HTTP/2 as well.
    pub http2: bool,
    /// `limits.requests_per_connection`, where a connection is to last.
    pub requests_per_connection: Option<u64>,
}

impl ServerOptions {
    /// As the command line says.
    pub fn new(arguments: &ServerArguments, ack: Ack) -> Self {
        ServerOptions {
            level: arguments.level,
            ack,
            destination: Destination::Plain(arguments.destination),
            spool_size: arguments.spool_size.clone(),
            spool_parent: arguments.spool_directory.clone(),
            floor_receive: false,
            connections_max: None,
            uplink_apart: false,
            is_spread: false,
            idle: None,
            tls: None,
            http2: false,
            requests_per_connection: None,
        }
    }
}

pub struct Server {
    weir: Weir,
    address: SocketAddr,
    admin: SocketAddr,
    /// Holds the spool. Dropped after the process that has it locked.
    spool: TempDir,
    /// Holds the configuration and the log.
    directory: TempDir,
    binary: PathBuf,
}

impl Server {
    /// Starts a weir, and returns once it accepts connections.
    pub fn start(weir_path: &Path, cpus: CpuPlan, options: &ServerOptions) -> Result<Server> {
        let prefix = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix("weir-perf-");
            builder
        };
        let directory = prefix().tempdir().context("a temporary directory")?;
        let spool_parent = options.spool_parent.as_deref();
        let spool = prefix()
            .tempdir_in(spool_parent.unwrap_or(directory.path()))
            .context("a temporary directory for the spool")?;
        let admin = free_address()?;
        // It is put between quotes below.
        let spool_path = fs::canonicalize(spool.path()).context("the spool's directory")?;
        fs::write(
            directory.path().join("weir.toml"),
            config_text(admin, &spool_path, options),
        )
        .context("writing the configuration")?;
        if let Some(identity) = &options.tls {
            identity.write(directory.path())?;
        }
        let more: &[&str] = if options.floor_receive {
            &["--floor-receive"]
        } else {
            &[]
        };
        // The child inherits this thread's affinity.
        if options.uplink_apart {
            cpu::allow(&[cpus.server, cpus.client])?;
        } else {
            cpu::pin(cpus.server)?;
        }
        let spawned = Weir::spawn(weir_path, directory.path(), more);
        cpu::pin(cpus.client)?;
        let mut weir = spawned?;
        let address = weir.listening(START_TIMEOUT)?;
        Ok(Server {
            weir,
            address,
            admin,
            spool,
            directory,
            binary: weir_path.to_owned(),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The directory of the spool; its file system is the one that commits are written to.
    pub fn spool(&self) -> &Path {
        self.spool.path()
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

    /// What `weir plan` says that it holds in memory, in bytes; as precise as the plan is printed.
    pub fn planned_bytes(&self) -> Result<u64> {
        let plan = Command::new(&self.binary)
            .args(["plan", "--config", "weir.toml"])
            .current_dir(self.directory.path())
            .output()
            .context("weir plan")?;
        let text = String::from_utf8_lossy(&plan.stdout);
        plan_total(&text).with_context(|| format!("no total in what `weir plan` says: {text}"))
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

fn config_text(admin: SocketAddr, spool: &Path, options: &ServerOptions) -> String {
    let destination = match &options.destination {
        Destination::Plain(PlainDestination::Null) => "[destination]\ntype = \"null\"",
        Destination::Plain(PlainDestination::Directory) => {
            "[destination]\ntype = \"directory\"\npath = \"out\""
        }
        Destination::Kusto(text) => text,
    };
    let ack = options.ack.name();
    let mut front = String::new();
    if options.tls.is_some() {
        front.push_str("tls = { certificate = \"tls.crt\", key = \"tls.key\" }\n");
    }
    if options.http2 {
        front.push_str("http2 = true\n");
    }
    let mut text = format!(
        r#"cores = 1

[[listener]]
address = "127.0.0.1:0"
{front}
[admin]
address = "{admin}"

{destination}

[spool]
directory = {:?}
size = {:?}

[compression]
level = {}

[[route]]
path = "/*"
database = "Telemetry"
table = "Events"
ack = "{ack}"
"#,
        spool.display().to_string(),
        options.spool_size,
        options.level
    );
    let mut limits = String::new();
    if let Some(connections) = options.connections_max {
        limits.push_str(&format!("connections = {connections}\n"));
        if !options.is_spread {
            limits.push_str(&format!("connections_per_address = {connections}\n"));
        }
    }
    if let Some(requests) = options.requests_per_connection {
        limits.push_str(&format!("requests_per_connection = {requests}\n"));
    }
    if !limits.is_empty() {
        text.push_str(&format!("\n[limits]\n{limits}"));
    }
    if let Some(idle) = options.idle {
        text.push_str(&format!("\n[deadlines]\nidle = \"{idle}\"\n"));
    }
    text
}

/// The total of a memory plan, in bytes.
fn plan_total(plan: &str) -> Option<u64> {
    let total = plan
        .lines()
        .find_map(|line| line.strip_prefix("= total"))?
        .trim();
    let number_size =
        total.find(|character: char| !character.is_ascii_digit() && character != '.')?;
    let (number, unit) = total.split_at(number_size);
    let unit_size = match unit {
        "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some((number.parse::<f64>().ok()? * unit_size) as u64)
}

/// What a server says of its commits, since its start or between two pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Commits {
    pub count: f64,
    pub bytes: f64,
    /// All commits together, each from its begin to the return of its sync.
    pub microseconds: f64,
}

impl Commits {
    /// Since the server's start. An error if the page has none of them, or if one has failed.
    pub fn of(page: &str) -> Result<Commits> {
        let value = |name: &str| {
            metric_sum(page, name, "").with_context(|| format!("no {name} in /metrics"))
        };
        ensure!(
            value("weir_commit_failures")? == 0.0,
            "a commit of the server failed: its disk is not one to measure"
        );
        Ok(Commits {
            count: value("weir_commits")?,
            bytes: value("weir_commit_bytes")?,
            microseconds: value("weir_commit_microseconds")?,
        })
    }

    pub fn since(self, earlier: Commits) -> Commits {
        Commits {
            count: self.count - earlier.count,
            bytes: self.bytes - earlier.bytes,
            microseconds: self.microseconds - earlier.microseconds,
        }
    }

    pub fn mean_us(&self) -> f64 {
        self.microseconds / self.count
    }

    pub fn mean_bytes(&self) -> f64 {
        self.bytes / self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(ack: Ack) -> ServerOptions {
        ServerOptions {
            level: 2,
            ack,
            destination: Destination::Plain(PlainDestination::Null),
            spool_size: "256MiB".to_owned(),
            spool_parent: None,
            floor_receive: false,
            connections_max: None,
            uplink_apart: false,
            is_spread: false,
            idle: None,
            tls: None,
            http2: false,
            requests_per_connection: None,
        }
    }

    #[test]
    fn the_configuration_is_what_the_floors_are_compared_with() {
        let admin = "127.0.0.1:4711".parse().expect("an address");
        let spool = Path::new("/a \"b\"");
        let text = config_text(admin, spool, &options(Ack::Memory));
        for part in [
            "cores = 1\n",
            "address = \"127.0.0.1:0\"\n",
            "[admin]\naddress = \"127.0.0.1:4711\"\n",
            "[destination]\ntype = \"null\"\n",
            "[spool]\ndirectory = \"/a \\\"b\\\"\"\nsize = \"256MiB\"\n",
            "level = 2\n",
            "path = \"/*\"\ndatabase = \"Telemetry\"\ntable = \"Events\"\nack = \"memory\"\n",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert!(!text.contains("[limits]"));
        let other = ServerOptions {
            connections_max: Some(10_100),
            idle: Some("1h"),
            destination: Destination::Plain(PlainDestination::Directory),
            ..options(Ack::Durable)
        };
        let text = config_text(admin, spool, &other);
        assert!(text.contains("type = \"directory\"\npath = \"out\"\n"));
        assert!(text.ends_with(
            "ack = \"durable\"\n\n[limits]\nconnections = 10100\nconnections_per_address = 10100\n\n\
             [deadlines]\nidle = \"1h\"\n"
        ));
    }

    #[test]
    fn connections_of_many_addresses_meet_the_default_limit() {
        let admin = "127.0.0.1:4711".parse().expect("an address");
        let spread = ServerOptions {
            connections_max: Some(10_100),
            is_spread: true,
            ..options(Ack::Memory)
        };
        let text = config_text(admin, Path::new("/a"), &spread);
        assert!(text.ends_with("[limits]\nconnections = 10100\n"));
    }

    #[test]
    fn a_listener_is_told_what_it_speaks() {
        let admin = "127.0.0.1:4711".parse().expect("an address");
        let secure = ServerOptions {
            tls: Some(Identity::new().expect("made")),
            http2: true,
            requests_per_connection: Some(1_000_000),
            ..options(Ack::Memory)
        };
        let text = config_text(admin, Path::new("/a"), &secure);
        assert!(text.contains(
            "address = \"127.0.0.1:0\"\ntls = { certificate = \"tls.crt\", key = \"tls.key\" }\nhttp2 = true\n"
        ));
        assert!(text.ends_with("[limits]\nrequests_per_connection = 1000000\n"));
    }

    #[test]
    fn the_total_of_a_plan_is_read() {
        let plan = "= one core      63.89MiB\n\nprocess\n= total         84.50MiB\n\nlimit: none\n";
        assert_eq!(plan_total(plan), Some(88_604_672));
        assert_eq!(plan_total("= total  2GiB"), Some(2 << 30));
        assert_eq!(plan_total("= total  many"), None);
        assert_eq!(plan_total(""), None);
    }

    #[test]
    fn commits_are_read_and_a_failed_one_is_refused() {
        let page = |count: u64, failures: u64| {
            format!(
                "weir_commits_total {count}\nweir_commit_bytes_total {}\n\
                 weir_commit_microseconds_total {}\nweir_commit_failures_total {failures}\n",
                count * 1_024,
                count * 300
            )
        };
        let earlier = Commits::of(&page(10, 0)).expect("all there");
        let commits = Commits::of(&page(30, 0)).expect("all there").since(earlier);
        assert_eq!(commits.count, 20.0);
        assert_eq!((commits.mean_us(), commits.mean_bytes()), (300.0, 1_024.0));
        assert!(Commits::of(&page(10, 1)).is_err());
        assert!(Commits::of("").is_err());
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
            Server::start(program, cpus, &options(Ack::Memory))
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
