//! A weir as a child process: started, asked where it listens, read, killed or stopped.
//!
//! Used by the tool's measurements and by [`crate::kill`].
//! Lives on the caller's thread, with one thread of its own that keeps the child's standard output from filling.
//! Allocates freely.
//!
//! Invariant: only the child started here is ever signalled, and it is gone when the value is.
//! Not here: its configuration, which the caller has put into the directory as `weir.toml`.

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// The server drains before it ends, and a drain is bounded.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
const METRICS_SIZE_MAX: u64 = 16 << 20;
/// What of the server's log an error repeats.
const LOG_TAIL_LINES: usize = 12;

/// A running weir.
pub struct Weir {
    child: Child,
    exit: OwnedFd,
    lines: Receiver<String>,
    log: PathBuf,
    ended: bool,
}

impl Weir {
    /// Starts `weir run` in `directory` with the `weir.toml` there and `more` arguments.
    /// Its log is added to the file `log` there. Returns as soon as the process exists.
    pub fn spawn(weir: &Path, directory: &Path, more: &[&str]) -> Result<Weir> {
        let run: &[&str] = &["run", "--config", "weir.toml"];
        Self::spawn_with(weir, directory, &[run, more].concat())
    }

    /// Starts `weir standin` in `directory`, which then says in `destination.toml` how a node reaches it.
    /// It ingests nothing before [`Weir::ingest`].
    pub fn spawn_standin(weir: &Path, directory: &Path) -> Result<Weir> {
        Self::spawn_with(weir, directory, &["standin", "--hold"])
    }

    /// Lets a stand-in ingest what was delivered to it.
    pub fn ingest(&self) -> Result<()> {
        rustix::process::pidfd_send_signal(&self.exit, Signal::USR1)
            .context("signalling the stand-in")
    }

    fn spawn_with(weir: &Path, directory: &Path, arguments: &[&str]) -> Result<Weir> {
        let log = directory.join("log");
        let stderr = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .context("opening the log")?;
        let mut child = Command::new(weir)
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("starting {}", weir.display()))?;
        let stdout = child.stdout.take();
        let exit = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let (Some(stdout), Ok(exit)) = (stdout, exit) else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("no pipe from, or no handle on, the server's process");
        };
        Ok(Weir {
            lines: forward_lines(stdout)?,
            child,
            exit,
            log,
            ended: false,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first address it listens on, once it does; an error if it ends or takes longer than `timeout`.
    pub fn listening(&mut self, timeout: Duration) -> Result<SocketAddr> {
        match first_listener(&self.lines, timeout) {
            Ok(address) => Ok(address),
            Err(reason) => {
                // Where it ended by itself, its log says why once it has been waited for.
                let _ = self.terminate();
                bail!("the server did not start: {reason}{}", self.log_tail());
            }
        }
    }

    /// The first address it listens on, or `None` if it says none before `deadline`.
    pub fn listening_before(&self, deadline: Instant) -> Option<SocketAddr> {
        first_listener(
            &self.lines,
            deadline.saturating_duration_since(Instant::now()),
        )
        .ok()
    }

    /// SIGKILL. An error if the process had ended before, by itself.
    pub fn kill(mut self) -> Result<()> {
        self.ended = true;
        // The handle stays valid until the child is waited for, so the signal cannot meet a stranger.
        let _ = self.child.kill();
        let status = self.child.wait().context("waiting for the server")?;
        ensure!(
            status.signal() == Some(Signal::KILL.as_raw()),
            "the server ended by itself, with {status}{}",
            self.log_tail()
        );
        Ok(())
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
        self.ended = true;
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

    /// The end of its log, as an error repeats it.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        if lines.is_empty() {
            return String::new();
        }
        let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
        format!("; its log ends:\n{}", tail.join("\n"))
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.terminate();
        }
    }
}

/// A port that was free a moment ago. Another program may take it first; then the server says so and ends.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("looking for a free port")?;
    listener.local_addr().context("looking for a free port")
}

/// The metrics page of the admin server at `admin`, as text.
pub fn metrics(admin: SocketAddr) -> Result<String> {
    page(admin, "/metrics")
}

/// A page of an HTTP server that answers with 200.
pub fn page(admin: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, ADMIN_TIMEOUT)
        .context("connecting to the admin address")?;
    stream.set_read_timeout(Some(ADMIN_TIMEOUT))?;
    stream.set_write_timeout(Some(ADMIN_TIMEOUT))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = String::new();
    stream
        .take(METRICS_SIZE_MAX)
        .read_to_string(&mut answer)
        .with_context(|| format!("reading {path}"))?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("an answer without a head from {path}"))?;
    ensure!(
        head.starts_with("HTTP/1.1 200"),
        "{path} answered {}",
        head.lines().next().unwrap_or("nothing")
    );
    Ok(body.to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

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
        let address = first_listener(&lines, TIMEOUT).expect("it is there");
        assert_eq!(address.port(), 5);
    }

    #[test]
    fn a_server_that_ends_at_once_has_no_listener() {
        let lines = forward_lines(b"".as_slice()).expect("a thread");
        let reason = first_listener(&lines, TIMEOUT).expect_err("nothing was said");
        assert_eq!(reason, "it ended at once");
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
