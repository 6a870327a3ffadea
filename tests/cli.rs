//! The program's arguments, messages and exit codes, as a script sees them.
//!
//! Mostly `weir check` and `weir plan`, which open no socket and no ring; `weir demo` once, with its directory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

fn weir(directory: &Path, arguments: &[&str]) -> Output {
    command(directory, arguments).output().unwrap()
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.current_dir(directory).args(arguments);
    command
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A directory with `weir.toml` in it.
fn configured(text: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("weir.toml"), text).unwrap();
    directory
}

#[test]
fn check_accepts_an_empty_file() {
    let directory = configured("");
    let output = weir(directory.path(), &["check", "--config", "weir.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).starts_with("weir.toml: valid\n"));
    assert_eq!(stderr(&output), "");
}

#[test]
fn check_places_every_error_on_a_line_of_its_own() {
    let directory = configured("[compression]\nlevel = 20\n\n[response]\nstatus = 500\n");
    let output = weir(directory.path(), &["check", "--config", "weir.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stdout(&output), "");
    let lines: Vec<&str> = stderr(&output).lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].starts_with("weir.toml:2:9: compression.level: 20 "));
    assert!(lines[1].starts_with("weir.toml:5:10: response.status: 500 "));
}

#[test]
fn an_unknown_key_says_what_was_meant_to_every_subcommand() {
    let directory = configured("[batch]\nmax_agee = \"1s\"\n");
    for subcommand in ["check", "plan"] {
        let output = weir(directory.path(), &[subcommand, "--config", "weir.toml"]);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(
            stderr(&output),
            "weir.toml:2:1: batch.max_agee: unknown key `max_agee`; did you mean `max_age`?\n"
        );
    }
}

#[test]
fn check_warns_and_still_exits_with_0() {
    let routes: String = (0..4)
        .map(|index| format!("[[route]]\npath = \"/{index}\"\ntable = \"T{index}\"\n"))
        .collect();
    let directory = configured(&format!("[memory]\nlimit = \"1MiB\"\n{routes}"));
    let output = weir(directory.path(), &["check", "--config", "weir.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let warnings: Vec<&str> = stdout(&output)
        .lines()
        .filter(|line| line.starts_with("warning: "))
        .collect();
    let has = |part| warnings.iter().any(|warning| warning.contains(part));
    assert!(has("upload.buffer_count to 5"), "{warnings:?}");
    assert!(has("will not start here"), "{warnings:?}");
}

#[test]
fn check_online_stops_at_the_first_step_that_fails() {
    // Port 1 of loopback: nobody listens there.
    let directory = configured(
        "[destination]\ntype = \"kusto\"\ningest_uri = \"http://127.0.0.1:1\"\nidentity = { azure_cli = {} }\n",
    );
    let arguments = ["check", "--config", "weir.toml", "--online"];
    let output = weir(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.starts_with("weir.toml: valid\n"), "{text}");
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("FAILED  endpoint  no answer from 127.0.0.1:1: "),
        "{last}"
    );
    assert!(
        last.ends_with("check that a firewall or proxy lets weir through"),
        "{last}"
    );
    assert!(
        stderr(&output).contains("1 of the steps above failed"),
        "{}",
        stderr(&output)
    );

    let directory = configured("");
    let output = weir(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).ends_with("the destination is not Kusto\n"));
}

#[test]
fn a_missing_file_is_one_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let output = weir(directory.path(), &["check", "--config", "none.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("weir: cannot read the configuration none.toml: "));
    assert_eq!(stderr(&output).lines().count(), 1);
}

#[test]
fn plan_adds_up() {
    let directory = tempfile::tempdir().unwrap();
    let output = weir(directory.path(), &["plan"]);
    // The limit of where this test runs may be below the sum; the table comes first either way.
    let text = stdout(&output);
    for line in [
        "slabs of 8MiB 4 8MiB 32MiB",
        "upload buffers 4 4MiB 16MiB",
        "deflate states 4 372KiB 1.45MiB",
        "connections 1024 3.50KiB 3.50MiB",
        "JSON scratch 1",
        "= one core",
        "control",
        "= total",
        "limit: ",
        "slabs: ",
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            text.lines().any(|found| squeezed(found).starts_with(line)),
            "no {line:?} in\n{text}"
        );
    }
}

#[test]
fn plan_above_the_limit_prints_the_table_and_fails() {
    let directory = configured("[memory]\nlimit = \"32MiB\"\n");
    let output = weir(directory.path(), &["plan", "--config", "weir.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("limit: 32MiB (memory.limit)"));
    let message = stderr(&output);
    assert!(message.starts_with("weir: the memory sum is "), "{message}");
    assert!(message.contains("above the limit of 32MiB (memory.limit)"));
    assert!(message.contains("slabs of 8MiB 32MiB (slabs.classes)"));
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn plan_says_whether_slabs_will_be_registered() {
    let memlock_limit = 8 << 20;
    if getrlimit(Resource::Memlock)
        .maximum
        .is_some_and(|maximum| maximum < memlock_limit)
    {
        return;
    }
    let directory = configured("[slabs]\nregistered = \"require\"\n");
    let mut command = command(directory.path(), &["plan", "--config", "weir.toml"]);
    // SAFETY: between fork and exec the closure only makes system calls.
    unsafe {
        command.pre_exec(move || {
            setrlimit(
                Resource::Memlock,
                Rlimit {
                    current: Some(memlock_limit),
                    maximum: Some(memlock_limit),
                },
            )?;
            // Root would get the capability back at exec; for others there is nothing to drop.
            match remove_capability_from_bounding_set(CapabilitySet::IPC_LOCK) {
                Ok(()) | Err(Errno::PERM) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
    }
    let output = command.output().unwrap();
    let text = stdout(&output);
    assert!(
        text.contains(
            "slabs: unregistered: the memlock limit is 8MiB, slabs need 41MiB; \
             same slabs, same bounds; to register them: ulimit -l 41984\n"
        ),
        "{text}"
    );
    assert!(text.contains("so weir will not start here"), "{text}");
}

#[test]
fn the_demo_with_a_directory_takes_an_event_and_shows_where_it_went() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = command(directory.path(), &["demo", "--out", "blobs"])
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(demo.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("Ctrl-C") {
        assert_ne!(stdout.read_line(&mut said).unwrap(), 0, "it ended: {said}");
    }
    let address = said
        .lines()
        .find_map(|line| line.strip_prefix("listening on "))
        .unwrap();
    // What it proposes to try, and where it says that the blobs are.
    assert!(
        said.contains(&format!(
            "'{{\"hello\": \"weir\"}}' http://{address}/demo\n"
        )),
        "{said}"
    );
    assert!(said.contains("in blobs/Telemetry/Events/\n"), "{said}");
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let body = "{\"hello\": \"weir\"}";
    let length = body.len();
    write!(
        stream,
        "POST /demo HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("{\"accepted\":1}\n"), "{answer}");
    kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
    stdout.read_to_string(&mut said).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(0), "{said}");
    assert!(
        said.contains("1 records in 1 blobs in blobs/Telemetry/Events/"),
        "{said}"
    );
    // Its own last words, run as they stand.
    let hint = said.lines().find(|line| line.contains("gunzip")).unwrap();
    let rows = Command::new("sh")
        .args(["-c", hint])
        .current_dir(directory.path())
        .output()
        .unwrap();
    let rows: Vec<&str> = self::stdout(&rows).lines().collect();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert!(
        rows[0].ends_with("\"tag\":\"demo\",\"log\":{\"hello\":\"weir\"}}"),
        "{rows:?}"
    );
}

#[test]
fn help_names_every_subcommand() {
    let directory = tempfile::tempdir().unwrap();
    let output = weir(directory.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    for subcommand in ["run", "demo", "check", "plan"] {
        assert!(stdout(&output).contains(&format!("\n  {subcommand} ")));
    }
    assert_eq!(weir(directory.path(), &["flow"]).status.code(), Some(2));
    assert_eq!(weir(directory.path(), &[]).status.code(), Some(2));
}
