//! What the tests of the running program share: a weir in a directory of its own, a raw HTTP client, the rows it wrote.

#![allow(dead_code)] // Each test binary uses its own part of this.

pub mod http2;
pub mod sim_disk;
pub mod tls;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a test waits for an answer before it calls it a hang.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running weir.
pub struct Weir {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub directory: tempfile::TempDir,
}

/// A port that is free now, and below those that the kernel gives to connections (`ip_local_port_range` in `ip(7)`):
/// tests that run beside this one open thousands.
pub fn free_address() -> SocketAddr {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = 97 * std::process::id() + COUNT.fetch_add(1, Ordering::Relaxed);
        let address = SocketAddr::from(([127, 0, 0, 1], 20_000 + (number % 12_000) as u16));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// The part of a configuration that every test wants: free ports, blobs under `out`, sealed soon.
pub fn base_config(admin: SocketAddr) -> String {
    format!(
        "[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"{admin}\"\n\
         [destination]\ntype = \"directory\"\npath = \"out\"\n[spool]\ndirectory = \"spool\"\nsize = \"64MiB\"\n[batch]\nmax_age = \"200ms\"\n"
    )
}

impl Weir {
    /// Starts weir with the base configuration and `more`.
    pub fn start(more: &str) -> Weir {
        let admin = free_address();
        Self::start_with(&format!("{}{more}", base_config(admin)), admin)
    }

    /// Starts weir with a whole configuration.
    pub fn start_with(config: &str, admin: SocketAddr) -> Weir {
        Self::start_in(tempfile::tempdir().unwrap(), config, admin)
    }

    /// Starts weir where another one was before.
    pub fn start_in(directory: tempfile::TempDir, config: &str, admin: SocketAddr) -> Weir {
        let child = command(directory.path(), config).spawn().unwrap();
        Self::started(child, directory, admin)
    }

    /// Starts weir with its log in a file, for what says more than a pipe holds: see [`Weir::log`].
    pub fn start_logging(
        directory: tempfile::TempDir,
        config: &str,
        admin: SocketAddr,
        level: &str,
    ) -> Weir {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(directory.path().join("log"))
            .unwrap();
        let child = command(directory.path(), config)
            .env("WEIR_LOG", level)
            .stderr(log)
            .spawn()
            .unwrap();
        Self::started(child, directory, admin)
    }

    /// What the runs in this directory have logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    fn started(mut child: Child, directory: tempfile::TempDir, admin: SocketAddr) -> Weir {
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let said = said(&mut child, directory.path());
            panic!("weir did not start: {said}");
        };
        Weir {
            address: address.parse().unwrap(),
            admin,
            directory,
            child,
        }
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until everything is delivered, then [`Weir::stop`]: what a core took the memory back of stays in the spool
    /// where the end comes first.
    pub fn stop_delivered(self) -> Stopped {
        let deadline = Instant::now() + PATIENCE;
        let waits = |page: String| {
            page.lines().any(|line| {
                let row = line.starts_with("weir_rows_in_spool ")
                    || line.starts_with("weir_rows_in_memory ");
                row && !line.ends_with(" 0")
            })
        };
        while waits(self.metrics()) {
            assert!(Instant::now() < deadline, "it is never delivered");
        }
        self.stop()
    }

    /// Sends SIGTERM and waits for a clean end; what weir left behind.
    pub fn stop(mut self) -> Stopped {
        let (code, stderr) = self.signal_and_wait();
        assert_eq!(code, Some(0), "{stderr}");
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        Stopped { stderr, directory }
    }

    /// Kills weir as a power cut would, and waits; what it left behind.
    pub fn kill(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap())
    }

    /// Puts a file where the table's directory should be, so that nothing can be delivered; or takes it away again.
    pub fn block_delivery(&self, table: &str, blocked: bool) {
        block_delivery(self.directory.path(), table, blocked);
    }

    /// Sends SIGTERM and waits; the exit code and the log.
    pub fn terminate(mut self) -> (Option<i32>, String) {
        self.signal_and_wait()
    }

    fn signal_and_wait(&mut self) -> (Option<i32>, String) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let said = said(&mut self.child, self.directory.path());
        (self.child.wait().unwrap().code(), said)
    }

    /// One value of the metrics page.
    pub fn metric(&self, name: &str) -> u64 {
        let page = self.metrics();
        let line = page
            .lines()
            .find(|line| line.split(' ').next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// At rest, every record is acknowledged or not, and every row is somewhere.
    pub fn assert_accounts_balance(&self) {
        let page = self.metrics();
        let value = |name: &str| -> u64 {
            let line = page
                .lines()
                .find(|line| line.split(' ').next() == Some(name));
            line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
        };
        assert_eq!(
            value("weir_records_total")
                + value("weir_records_unacknowledged_total")
                + value("weir_recovered_rows_total"),
            value("weir_rows_in_memory")
                + value("weir_rows_in_spool")
                + value("weir_delivered_rows_total")
                + value("weir_dead_letter_rows_total"),
            "{page}"
        );
    }

    /// Reads the metrics until one line is `line`.
    pub fn wait_for_metric(&self, line: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.metrics().lines().any(|found| found == line) {
            assert!(Instant::now() < deadline, "{line:?} never came");
        }
    }

    pub fn metrics(&self) -> String {
        self.admin_get("/metrics").1
    }

    /// Status and body of an admin page.
    pub fn admin_get(&self, path: &str) -> (u16, String) {
        let mut client = Client::connect(self.admin);
        client.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        let reply = client.reply();
        (reply.status, reply.body)
    }

    /// `received = accepted + rejected + refused + aborted`; the four.
    pub fn outcomes(&self) -> [u64; 4] {
        let page = self.metrics();
        let value = |name: &str| -> u64 {
            let line = page.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let outcomes = ["accepted", "rejected", "refused", "aborted"]
            .map(|outcome| value(&format!("weir_requests_total{{outcome=\"{outcome}\"}}")));
        assert_eq!(
            value("weir_requests_received_total"),
            outcomes.iter().sum::<u64>()
        );
        outcomes
    }
}

/// Waits until a weir has closed its log; all of it.
fn said(child: &mut Child, directory: &Path) -> String {
    let mut said = String::new();
    match child.stderr.take() {
        Some(mut stderr) => {
            stderr.read_to_string(&mut said).unwrap();
        }
        None => {
            child.wait().unwrap();
            said = std::fs::read_to_string(directory.join("log")).unwrap();
        }
    }
    said
}

impl Drop for Weir {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// [`Weir::block_delivery`], for a weir that does not run.
pub fn block_delivery(directory: &Path, table: &str, blocked: bool) {
    let path = directory.join("out/Telemetry").join(table);
    let aside = directory.join(format!("{table}.aside"));
    if blocked {
        std::fs::rename(&path, &aside).unwrap();
        std::fs::write(&path, b"in the way").unwrap();
    } else {
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&aside, &path).unwrap();
    }
}

/// `weir run` with `config` in `directory`, its streams piped.
pub fn command(directory: &Path, config: &str) -> Command {
    let path = directory.join("weir.toml");
    std::fs::write(&path, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command
        .args(["run", "--config"])
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs a weir that ends by itself; its exit code and what it said.
pub fn run_to_its_end(directory: &Path, config: &str) -> (Option<i32>, String) {
    let mut child = command(directory, config).spawn().unwrap();
    let mut stderr = String::new();
    let mut pipe = child.stderr.take().unwrap();
    pipe.read_to_string(&mut stderr).unwrap();
    (child.wait().unwrap().code(), stderr)
}

/// Numbers without a pattern, the same at every run (a linear congruential generator, Knuth's constants).
pub fn noise() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(1_u64), |state| {
        Some(
            state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407),
        )
    })
}

/// A weir that has ended.
pub struct Stopped {
    pub stderr: String,
    pub directory: tempfile::TempDir,
}

impl Stopped {
    /// All rows of a table, blob by blob in the order of their names.
    pub fn rows(&self, database: &str, table: &str) -> Vec<String> {
        rows(&self.directory.path().join("out").join(database).join(table))
    }

    /// The rows of the default table, which may never have had one.
    pub fn rows_or_none(&self) -> Vec<String> {
        let table = self.directory.path().join("out/Telemetry/Events");
        match table.exists() {
            true => rows(&table),
            false => Vec::new(),
        }
    }
}

/// Rows of all blobs in a directory. Every file must be one complete gzip member of whole lines.
pub fn rows(directory: &Path) -> Vec<String> {
    let mut rows = Vec::new();
    for path in blobs(directory) {
        let bytes = std::fs::read(&path).unwrap();
        let mut decoder = flate2::bufread::GzDecoder::new(bytes.as_slice());
        let mut text = String::new();
        decoder.read_to_string(&mut text).unwrap();
        assert!(
            decoder.into_inner().is_empty(),
            "{path:?} has bytes after its gzip member"
        );
        assert!(text.ends_with('\n'), "{path:?} ends within a row");
        rows.extend(text.lines().map(str::to_owned));
    }
    rows
}

/// The blobs of a directory, in the order of their names. No other file may be there.
pub fn blobs(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in &paths {
        assert!(path.to_str().unwrap().ends_with(".json.gz"), "{path:?}");
    }
    paths
}

/// A client that sends exactly what it is told to.
pub struct Client {
    pub stream: TcpStream,
    reader: BufReader<TcpStream>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    pub fn closes(&self) -> bool {
        self.head.to_ascii_lowercase().contains("connection: close")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client {
            reader: BufReader::new(stream.try_clone().unwrap()),
            stream,
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a request with `Content-Length`, and reads its answer.
    pub fn post(&mut self, path: &str, body: &[u8]) -> Reply {
        self.send(&request(path, body));
        self.reply()
    }

    /// Reads one answer.
    pub fn reply(&mut self) -> Reply {
        self.try_reply()
            .expect("an answer, not the end of the stream")
    }

    /// Reads one answer; `None` at the end of the stream.
    pub fn try_reply(&mut self) -> Option<Reply> {
        let mut head = String::new();
        loop {
            let size = self.reader.read_line(&mut head).unwrap();
            if size == 0 {
                assert_eq!(head, "", "the stream ended within a head");
                return None;
            }
            if head.ends_with("\r\n\r\n") {
                break;
            }
        }
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.parse().unwrap())
        });
        let mut body = vec![0; length.unwrap_or(0)];
        self.reader.read_exact(&mut body).unwrap();
        Some(Reply {
            status,
            head,
            body: String::from_utf8(body).unwrap(),
        })
    }

    /// Asserts that the peer closes without another byte.
    pub fn expect_end(&mut self) {
        assert_eq!(self.try_reply(), None);
    }
}

/// A POST with `Content-Length`.
pub fn request(path: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A POST whose body is chunked in pieces of `chunk_size`.
pub fn chunked_request(path: &str, body: &[u8], chunk_size: usize) -> Vec<u8> {
    let mut bytes =
        format!("POST {path} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
            .into_bytes();
    for chunk in body.chunks(chunk_size) {
        bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// The record of a row in the fluent-bit envelope, and its tag.
pub fn unwrap_row(row: &str) -> (String, String) {
    let rest = row.strip_prefix("{\"timestamp\":\"").unwrap();
    let (_, rest) = rest.split_once("\",\"tag\":\"").unwrap();
    let (tag, rest) = rest.split_once("\",\"log\":").unwrap();
    (tag.to_owned(), rest.strip_suffix('}').unwrap().to_owned())
}

/// Records only, of rows in the fluent-bit envelope.
pub fn records(rows: &[String]) -> Vec<String> {
    rows.iter().map(|row| unwrap_row(row).1).collect()
}
