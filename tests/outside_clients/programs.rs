//! Programs that nobody here wrote, as child processes: how each is called, and what its output says.
//!
//! Every run is bounded by an option of the program itself; none reads a configuration or a proxy of this machine.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use serde_json::Value;

/// What no program takes longer for, in seconds.
const TIME_MAX: &str = "120";

/// Runs a program to its end, with `input` as its standard input.
fn run(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{:?}: {error}", command.get_program()));
    let mut stdin = child.stdin.take().unwrap();
    thread::scope(|scope| {
        // A program need not read its input to the end.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    })
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One transfer of curl.
#[derive(Debug, PartialEq)]
pub struct Transfer {
    pub status: u16,
    /// `1.1` or `2`.
    pub version: String,
    /// Connections made for it: 0 where one was kept.
    pub connects: u32,
    pub uploaded: u64,
    pub body: String,
}

/// A run of curl.
#[derive(Debug)]
pub struct Curl {
    pub code: i32,
    pub transfers: Vec<Transfer>,
    /// What it did, line by line, with the heads that it sent (`> …`) and received (`< …`).
    pub trace: String,
}

/// Runs curl, which waits for `100 Continue` for as long as it runs.
pub fn curl(arguments: &[&str], input: &[u8]) -> Curl {
    let mut command = Command::new("curl");
    command
        .args([
            "--disable",
            "--noproxy",
            "*",
            "--silent",
            "--show-error",
            "--verbose",
        ])
        .args(["--max-time", TIME_MAX, "--expect100-timeout", TIME_MAX])
        .args([
            "--write-out",
            "\u{1e}%{http_code} %{http_version} %{num_connects} %{size_upload}\u{1f}",
        ])
        .args(arguments);
    let output = run(command, input);
    let said = text(output.stdout);
    // Behind each body a record separator, the numbers, a unit separator.
    let transfers = said.split_terminator('\u{1f}').map(|transfer| {
        let (body, numbers) = transfer.split_once('\u{1e}').unwrap();
        let numbers: Vec<&str> = numbers.split(' ').collect();
        Transfer {
            status: numbers[0].parse().unwrap(),
            version: numbers[1].into(),
            connects: numbers[2].parse().unwrap(),
            uploaded: numbers[3].parse().unwrap(),
            body: body.into(),
        }
    });
    Curl {
        code: output.status.code().unwrap(),
        transfers: transfers.collect(),
        trace: text(output.stderr),
    }
}

impl Curl {
    /// Whether an interim answer let it send its body.
    pub fn was_continued(&self) -> bool {
        self.trace
            .lines()
            .any(|line| line.starts_with("< HTTP/1.1 100 "))
    }

    /// Statuses of its transfers.
    pub fn statuses(&self) -> Vec<u16> {
        self.transfers
            .iter()
            .map(|transfer| transfer.status)
            .collect()
    }
}

/// The hexadecimal HMAC-SHA-256 of a file, by openssl.
pub fn openssl_hmac(secret: &str, path: &Path) -> String {
    let mut command = Command::new("openssl");
    command
        .args(["dgst", "-sha256", "-r", "-hmac", secret])
        .arg(path);
    let said = text(run(command, b"").stdout);
    said.split(' ').next().unwrap().to_owned()
}

/// What h2load says of its requests.
#[derive(Debug, Default, PartialEq)]
pub struct Load {
    pub total: u64,
    pub done: u64,
    pub succeeded: u64,
    pub failed: u64,
    pub errored: u64,
    pub answered_2xx: u64,
}

/// Posts `path` again and again with h2load.
pub fn h2load(arguments: &[&str], path: &Path) -> Load {
    let mut command = Command::new("h2load");
    command
        .args(["--connection-active-timeout", TIME_MAX])
        .args(["--header", "content-type: application/json"])
        .arg("--data")
        .arg(path)
        .args(arguments);
    let output = run(command, b"");
    let said = text(output.stdout);
    let line = |begin: &str| {
        let found = said.lines().find_map(|line| line.strip_prefix(begin));
        found.unwrap_or_else(|| {
            panic!(
                "no {begin:?} in {said}{}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    };
    // `requests: 100 total, 100 started, 100 done, …` and `status codes: 100 2xx, 0 3xx, …`
    let count = |line: &str, name: &str| -> u64 {
        let found = line
            .split(", ")
            .find_map(|part| part.trim().strip_suffix(name));
        found
            .unwrap_or_else(|| panic!("no {name:?} in {line}"))
            .trim()
            .parse()
            .unwrap()
    };
    let requests = line("requests: ");
    Load {
        total: count(requests, "total"),
        done: count(requests, "done"),
        succeeded: count(requests, "succeeded"),
        failed: count(requests, "failed"),
        errored: count(requests, "errored"),
        answered_2xx: count(line("status codes: "), "2xx"),
    }
}

impl Load {
    /// What it says where all of `total` requests were accepted.
    pub fn all_accepted(total: u64) -> Load {
        Load {
            total,
            done: total,
            succeeded: total,
            answered_2xx: total,
            ..Load::default()
        }
    }
}

/// Posts `path` with nghttp; the bodies of all answers, one behind the other.
pub fn nghttp(arguments: &[&str], path: &Path) -> String {
    let mut command = Command::new("nghttp");
    command
        .args(["--no-verify-peer", "--timeout", TIME_MAX])
        .args(["--header", "content-type: application/json"])
        .arg("--data")
        .arg(path)
        .args(arguments);
    let output = run(command, b"");
    assert!(output.status.success(), "{}", text(output.stderr));
    text(output.stdout)
}

/// Status, version and answer of a post of httpx.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Posted {
    pub status: u64,
    pub version: String,
    pub answer: String,
}

/// Posts all `bodies` at once with httpx; `config` is what `post.py` takes besides. How many were answered how.
pub fn httpx(mut config: Value, bodies: &[String]) -> BTreeMap<Posted, usize> {
    let python = std::env::var("WEIR_TEST_PYTHON")
        .expect("WEIR_TEST_PYTHON is what tests/python/venv.sh prints");
    config["bodies"] = bodies.into();
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/post.py"));
    let output = run(command, config.to_string().as_bytes());
    assert!(output.status.success(), "{}", text(output.stderr));
    let answers: Vec<(u64, String, String)> = serde_json::from_slice(&output.stdout).unwrap();
    let mut counts = BTreeMap::new();
    for (status, version, answer) in answers {
        let posted = Posted {
            status,
            version,
            answer,
        };
        *counts.entry(posted).or_default() += 1;
    }
    counts
}

/// What slowhttptest saw, second by second.
#[derive(Debug)]
pub struct Attack {
    /// The most connections that it had open in any second.
    pub connected_max: u64,
    /// Whether a request of its own was answered in every second.
    pub service_available: bool,
}

/// Runs slowhttptest against `url`.
pub fn slowhttptest(arguments: &[&str], url: &str) -> Attack {
    let directory = tempfile::tempdir().unwrap();
    let prefix = directory.path().join("attack");
    let mut command = Command::new("slowhttptest");
    command
        .args(arguments)
        .args(["-u", url, "-g", "-o"])
        .arg(&prefix);
    let output = run(command, b"");
    let csv = std::fs::read_to_string(prefix.with_extension("csv"))
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(output.stdout), text(output.stderr)));
    let mut lines = csv.lines();
    assert_eq!(
        lines.next(),
        Some("Seconds,Closed,Pending,Connected,Service Available")
    );
    let seconds: Vec<[u64; 5]> = lines
        .map(|line| {
            let numbers: Vec<u64> = line.split(',').map(|text| text.parse().unwrap()).collect();
            numbers.try_into().unwrap()
        })
        .collect();
    Attack {
        connected_max: seconds.iter().map(|second| second[3]).max().unwrap(),
        service_available: seconds.iter().all(|second| second[4] > 0),
    }
}
