//! The server under test: the release binary as a child, pinned to its CPU, with a configuration of ours.
//!
//! Starts before a case and ends after it; `client` sends to its address, `process` reads its counters.
//! Lives on the measuring thread, with one thread of its own that keeps the child's stdout from filling.
//!
//! Invariant: only the child started here is ever signalled, and it is gone when the value is.
//! Not here: what the server does with events. It discards them after compression (destination `null`).

use crate::cpu::{self, CpuPlan};
use crate::process::{self, Sample};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(20);
/// The server drains before it ends; with destination `null` that is quick.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
/// What of the server's log an error repeats.
const LOG_TAIL_LINES: usize = 12;

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
    child: Child,
    exit: OwnedFd,
    address: SocketAddr,
    admin: SocketAddr,
    /// Holds the configuration and the log; removed with this value.
    directory: TempDir,
    stopped: bool,
}

impl Server {
    /// Starts `weir`, and returns once it accepts connections.
    pub fn start(weir: &Path, cpus: CpuPlan, options: &ServerOptions) -> Result<Server> {
        let directory = tempfile::Builder::new()
            .prefix("weir-perf-")
            .tempdir()
            .context("a temporary directory")?;
        let admin = free_address()?;
        let config_path = directory.path().join("weir.toml");
        fs::write(&config_path, config_text(admin, options))
            .context("writing the configuration")?;
        let log = File::create(directory.path().join("log")).context("creating the log")?;

        let mut command = Command::new(weir);
        command.arg("run").arg("--config").arg(&config_path);
        if options.floor_receive {
            command.arg("--floor-receive");
        }
        command
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        // The child inherits this thread's affinity.
        cpu::pin(cpus.server)?;
        let spawned = command.spawn();
        cpu::pin(cpus.client)?;
        let mut child = spawned.with_context(|| format!("starting {}", weir.display()))?;

        let stdout = child.stdout.take();
        let exit = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let (Some(stdout), Ok(exit)) = (stdout, exit) else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("no pipe from, or no handle on, the server's process");
        };
        let mut server = Server {
            child,
            exit,
            address: admin,
            admin,
            directory,
            stopped: false,
        };
        let lines = forward_lines(stdout)?;
        match first_listener(&lines, START_TIMEOUT) {
            Ok(address) => server.address = address,
            Err(reason) => {
                // Where it ended by itself, its log says why once it has been waited for.
                let _ = server.terminate();
                bail!("the server did not start: {reason}{}", server.log_tail());
            }
        }
        Ok(server)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Memory and CPU time now. An error if the server has ended.
    pub fn sample(&self) -> Result<Sample> {
        process::sample(self.child.id())
            .with_context(|| format!("the server died{}", self.log_tail()))
    }

    /// Names of its threads that are not confined to `cpu`.
    pub fn threads_elsewhere(&self, cpu: usize) -> Result<Vec<String>> {
        process::threads_elsewhere(self.child.id(), cpu)
    }

    /// The metrics page, as text.
    pub fn metrics(&self) -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.admin, ADMIN_TIMEOUT)
            .context("connecting to the admin address")?;
        stream.set_read_timeout(Some(ADMIN_TIMEOUT))?;
        stream.set_write_timeout(Some(ADMIN_TIMEOUT))?;
        stream.write_all(
            format!(
                "GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
                self.admin
            )
            .as_bytes(),
        )?;
        let mut answer = String::new();
        stream
            .take(16 << 20)
            .read_to_string(&mut answer)
            .context("reading /metrics")?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("an answer without a head from /metrics")?;
        ensure!(
            head.starts_with("HTTP/1.1 200"),
            "/metrics answered {}",
            head.lines().next().unwrap_or("nothing")
        );
        Ok(body.to_owned())
    }

    /// Asks it to end and waits for it. An error if it does not, or says that it failed.
    pub fn stop(mut self) -> Result<()> {
        let status = self.terminate()?;
        ensure!(
            status.success(),
            "the server ended with {status}{}",
            self.log_tail()
        );
        Ok(())
    }

    fn terminate(&mut self) -> Result<ExitStatus> {
        self.stopped = true;
        // By process handle, so that it cannot meet a stranger with a reused id.
        let _ = rustix::process::pidfd_send_signal(&self.exit, Signal::TERM);
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut ended = [PollFd::new(&self.exit, PollFlags::IN)];
            match rustix::event::poll(&mut ended, Some(&timeout)) {
                Ok(0) => {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    bail!("the server did not end within {STOP_TIMEOUT:?} of SIGTERM");
                }
                Ok(_) => return self.child.wait().context("waiting for the server"),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for the server"),
            }
        }
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        if lines.is_empty() {
            return String::new();
        }
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        format!("; its log ends:\n{}", tail.join("\n"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.stopped {
            let _ = self.terminate();
        }
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
        text.push_str(&format!(
            "\n[limits]\nconnections = {connections}\nconnections_per_address = {connections}\n"
        ));
    }
    text
}

/// A port that was free a moment ago. Another program may take it first; then the server says so and ends.
fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    listener.local_addr().context("looking for a free port")
}

/// Reads lines on a thread until the pipe ends, also when nobody takes them any more.
fn forward_lines(stdout: impl Read + Send + 'static) -> Result<Receiver<String>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("stdout".to_owned())
        .spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { break };
                let _ = sender.send(line);
            }
        })
        .context("thread")?;
    Ok(receiver)
}

fn first_listener(lines: &Receiver<String>, timeout: Duration) -> Result<SocketAddr, String> {
    let deadline = Instant::now() + timeout;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some(address) = listening_address(&line) {
                    return Ok(address);
                }
            }
            Err(RecvTimeoutError::Timeout) => return Err(format!("no listener in {timeout:?}")),
            Err(RecvTimeoutError::Disconnected) => return Err("it ended at once".to_owned()),
        }
    }
}

fn listening_address(line: &str) -> Option<SocketAddr> {
    line.trim().strip_prefix("listening on ")?.parse().ok()
}

/// The sum of the samples of `name` (with or without a `_total` suffix) that carry `label`.
///
/// `None` if the page has no such sample.
pub fn metric_sum(page: &str, name: &str, label: &str) -> Option<f64> {
    let mut sum = None;
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let (series_name, labels) = series.split_once('{').unwrap_or((series, ""));
        if series_name.strip_suffix("_total").unwrap_or(series_name) == name
            && labels.contains(label)
            && let Ok(value) = value.parse::<f64>()
        {
            *sum.get_or_insert(0.0) += value;
        }
    }
    sum
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
        assert!(
            config_text(admin, &options)
                .ends_with("[limits]\nconnections = 10100\nconnections_per_address = 10100\n")
        );
    }

    #[test]
    fn only_a_listening_line_names_an_address() {
        assert_eq!(
            listening_address("listening on 127.0.0.1:9880"),
            Some("127.0.0.1:9880".parse().expect("an address"))
        );
        assert_eq!(listening_address("listening on port 9880"), None);
        assert_eq!(listening_address("admin on 127.0.0.1:9881"), None);
    }

    #[test]
    fn the_first_listener_is_found_among_other_lines() {
        let text = "weir 0.1.0\nlistening on 127.0.0.1:5\nlistening on 127.0.0.1:6\n";
        let lines = forward_lines(text.as_bytes()).expect("a thread");
        let address = first_listener(&lines, START_TIMEOUT).expect("it is there");
        assert_eq!(address.port(), 5);
    }

    #[test]
    fn a_server_that_ends_at_once_has_no_listener() {
        let lines = forward_lines(b"".as_slice()).expect("a thread");
        let reason = first_listener(&lines, START_TIMEOUT).expect_err("nothing was said");
        assert_eq!(reason, "it ended at once");
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

    #[test]
    fn metrics_are_summed_by_name_and_label() {
        let page = "# HELP weir_requests Requests\n# TYPE weir_requests counter\n\
                    weir_requests_total{core=\"0\",outcome=\"accepted\"} 40\n\
                    weir_requests_total{core=\"1\",outcome=\"accepted\"} 2\n\
                    weir_requests_total{core=\"0\",outcome=\"rejected\"} 7\n\
                    weir_requests_received 49\n";
        assert_eq!(
            metric_sum(page, "weir_requests", "outcome=\"accepted\""),
            Some(42.0)
        );
        assert_eq!(metric_sum(page, "weir_requests_received", ""), Some(49.0));
        assert_eq!(metric_sum(page, "weir_rows", ""), None);
    }
}
