//! Reloading a running weir: what changes under a connection that stays open, and what does not.

mod support;

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{Client, PATIENCE, Reply, Weir, base_config, records, request};

/// A weir, and the part of its file that does not change.
struct Node {
    weir: Weir,
    base: String,
}

impl Node {
    /// Of all cores, so that each has to change.
    fn start(more: &str) -> Node {
        Self::start_with_files(more, &[])
    }

    fn start_with_files(more: &str, files: &[(&str, &str)]) -> Node {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(directory.path().join(name), content).unwrap();
        }
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let base = format!("cores = \"all\"\n{}", base_config(any));
        let config = format!("{base}{more}");
        let mut weir = Weir::start_logging(directory, &config, any, "info");
        // These tests open many connections, so a port that was free once may be one of theirs: it is the log that says.
        let deadline = Instant::now() + PATIENCE;
        weir.admin = loop {
            assert!(Instant::now() < deadline, "it is never ready");
            let log = weir.log();
            let admin = log.split_once("ready admin=");
            if let Some((address, _)) = admin.and_then(|(_, rest)| rest.split_once('\n')) {
                break address.parse().unwrap();
            }
        };
        Node { weir, base }
    }

    fn write(&self, more: &str) {
        self.write_file("weir.toml", &format!("{}{more}", self.base));
    }

    fn write_file(&self, name: &str, content: &str) {
        std::fs::write(self.weir.directory.path().join(name), content).unwrap();
    }

    fn hang_up(&self) {
        let pid = Pid::from_raw(self.weir.pid() as i32).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
    }

    fn post_reload(&self) -> Reply {
        post(self.weir.admin, "Host: localhost\r\n")
    }

    /// Writes the file and reloads it; `changed` and `needs_restart`.
    fn reload(&self, more: &str) -> (Value, Value) {
        self.write(more);
        let reply = self.post_reload();
        assert_eq!(reply.status, 200, "{reply:?}");
        let mut outcome = reply.json();
        assert_eq!(outcome["reloaded"], true);
        (outcome["changed"].take(), outcome["needs_restart"].take())
    }

    fn reloads(&self, outcome: &str) -> u64 {
        let name = format!("weir_reloads_total{{outcome=\"{outcome}\"}}");
        self.weir.metric(&name)
    }
}

/// `POST /reload` with these fields.
fn post(admin: SocketAddr, fields: &str) -> Reply {
    let mut client = Client::connect(admin);
    client.send(format!("POST /reload HTTP/1.1\r\n{fields}\r\n").as_bytes());
    client.reply()
}

/// A request with more fields.
fn post_with(client: &mut Client, fields: &str) -> u16 {
    let head = format!("POST /x HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: 7\r\n\r\n");
    client.send(format!("{head}{{\"a\":1}}").as_bytes());
    client.reply().status
}

fn bearer(client: &mut Client, token: &str) -> u16 {
    post_with(client, &format!("Authorization: Bearer {token}\r\n"))
}

#[test]
fn a_hangup_changes_what_open_connections_get_and_closes_none() {
    let node = Node::start("");
    // Some on every core.
    let mut clients: Vec<Client> = (0..16).map(|_| node.weir.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    }
    let loaded_at = node.weir.metric("weir_config_loaded_at");
    node.write("[response]\nstatus = 200\n");
    node.hang_up();
    node.weir
        .wait_for_metric("weir_reloads_total{outcome=\"applied\"} 1");
    assert!(node.weir.metric("weir_config_loaded_at") >= loaded_at);
    for client in &mut clients {
        let reply = client.post("/x", b"{\"a\":1}");
        assert_eq!((reply.status, reply.closes()), (200, false));
    }
    assert_eq!(node.weir.metric("weir_connections"), 16);
    assert!(
        node.weir
            .log()
            .contains("reloaded changed={\"response.status\"}")
    );
}

#[test]
fn a_file_that_is_not_valid_changes_nothing_and_is_told_as_check_tells_it() {
    let node = Node::start("");
    let mut client = node.weir.connect();
    node.write("[response]\nstatus = 200\n[compression]\nlevel = 20\n[limits]\nwaitt = \"1s\"\n");
    let reply = node.post_reload();
    let checked = Command::new(env!("CARGO_BIN_EXE_weir"))
        .args(["check", "--config"])
        .arg(node.weir.directory.path().join("weir.toml"))
        .output()
        .unwrap();
    let said = String::from_utf8(checked.stderr).unwrap();
    assert_eq!((reply.status, &reply.body), (400, &said));
    assert!(said.contains(": limits.waitt: unknown key"), "{said}");
    // A secret that cannot be read comes after the file, and is as bad.
    let guarded =
        "[response]\nstatus = 200\n[[principal]]\nname = \"a\"\nbearer = [{ file = \"gone\" }]\n";
    node.write(guarded);
    let reply = node.post_reload();
    assert_eq!(reply.status, 400);
    let start = "weir: the credential of the principal a cannot be read: ";
    assert!(reply.body.starts_with(start), "{reply:?}");
    // And so does a file that is not there.
    std::fs::remove_file(node.weir.directory.path().join("weir.toml")).unwrap();
    node.hang_up();
    node.weir
        .wait_for_metric("weir_reloads_total{outcome=\"rejected\"} 3");
    assert_eq!(node.reloads("applied"), 0);
    let log = node.weir.log();
    assert!(
        log.contains("not reloaded, and nothing has changed: weir: cannot read the configuration"),
        "{log}"
    );
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    // Nothing of the bad ones is in the way of a good one.
    node.write_file("gone", "t");
    assert_eq!(
        node.reload(guarded),
        (json!(["principal[a]", "response.status"]), json!([]))
    );
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 200);
}

#[test]
fn tokens_are_rotated_under_an_open_connection() {
    let with = |tokens: &str| {
        format!(
            "[[principal]]\nname = \"other\"\nbasic = {{ user = \"u\", passwords = [{{ file = \"other\" }}] }}\n\
             [[principal]]\nname = \"shop\"\nbearer = [{tokens}]\n[[route]]\nprincipals = [\"shop\"]\n"
        )
    };
    let one = with("{ file = \"token\" }");
    let two = with("{ file = \"token\" }, { file = \"next\" }");
    let files = [("token", "old"), ("next", "new"), ("other", "secret")];
    let node = Node::start_with_files(&one, &files);
    let mut client = node.weir.connect();
    let mut answers = |tokens: [&str; 2]| tokens.map(|token| bearer(&mut client, token));
    assert_eq!(answers(["old", "new"]), [201, 401]);
    let changed = (json!(["principal[shop].bearer"]), json!([]));
    assert_eq!(node.reload(&two), changed);
    assert_eq!(answers(["old", "new"]), [201, 201]);
    // The file stays as it is, and only what it names has changed.
    node.write_file("token", "newest");
    assert_eq!(node.reload(&two), changed);
    assert_eq!(answers(["old", "new"]), [401, 201]);
    assert_eq!(answers(["newest", "new"]), [201, 201]);
    assert_eq!(node.reload(&two), (json!([]), json!([])));
    assert_eq!(node.reload(&one), changed);
    assert_eq!(answers(["newest", "new"]), [201, 401]);
    // Principals are found by name, wherever they stand.
    let turned = "[[principal]]\nname = \"shop\"\nbearer = [{ file = \"token\" }]\n\
                  [[principal]]\nname = \"added\"\nbearer = [{ file = \"next\" }]\n[[route]]\nprincipals = [\"shop\"]\n";
    assert_eq!(
        node.reload(turned),
        (json!(["principal[added]", "principal[other]"]), json!([]))
    );
    assert_eq!(answers(["newest", "new"]), [201, 403]);
}

#[test]
fn a_request_in_flight_ends_on_the_route_that_it_began_with() {
    let before = "[[route]]\npath = \"/kept\"\n[[route]]\npath = \"/gone\"\ntable = \"Gone\"\nenvelope = \"none\"\n";
    let node = Node::start(before);
    let mut client = node.weir.connect();
    let sent = request("/gone", b"{\"a\":1}");
    let (first, rest) = sent.split_at(sent.len() - 3);
    client.send(first);
    node.weir
        .wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
    assert_eq!(
        node.reload("[[route]]\npath = \"/kept\"\n"),
        (json!(["route[/gone]"]), json!([]))
    );
    let mut other = node.weir.connect();
    assert_eq!(other.post("/gone", b"{\"a\":2}").status, 404);
    client.send(rest);
    assert_eq!(client.reply().status, 201);
    // The next one on the same connection begins with what is now.
    let reply = client.post("/gone", b"{\"a\":3}");
    assert_eq!((reply.status, reply.closes()), (404, false));
    assert_eq!(client.post("/kept", b"{\"a\":4}").status, 201);
    // Its table is still there, so the route can come back.
    assert_eq!(node.reload(before), (json!(["route[/gone]"]), json!([])));
    assert_eq!(client.post("/gone", b"{\"a\":5}").status, 201);
    let stopped = node.weir.stop_delivered();
    assert_eq!(
        stopped.rows("Telemetry", "Gone"),
        ["{\"a\":1}", "{\"a\":5}"]
    );
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"a\":4}"]);
}

#[test]
fn a_rate_that_stays_goes_on_and_one_that_changes_begins_full() {
    // A body of a thousand bytes takes what a thousand seconds bring.
    let with = |rate: &str, status: u16| {
        format!("[response]\nstatus = {status}\n[[route]]\nrate = {{ bytes = {rate} }}\n")
    };
    let node = Node::start(&with("1", 201));
    let body = format!("{{\"a\":\"{}\"}}", "x".repeat(992));
    let mut client = node.weir.connect();
    let mut status = || client.post("/x", body.as_bytes()).status;
    assert_eq!([status(), status()], [201, 429]);
    assert_eq!(
        node.reload(&with("1", 200)),
        (json!(["response.status"]), json!([]))
    );
    assert_eq!(status(), 429);
    assert_eq!(
        node.reload(&with("2", 200)),
        (json!(["route[/*].rate"]), json!([]))
    );
    assert_eq!([status(), status()], [200, 429]);
    assert_eq!(
        node.reload("[response]\nstatus = 200\n[[route]]\n"),
        (json!(["route[/*].rate"]), json!([]))
    );
    assert_eq!([status(), status()], [200, 200]);
}

#[test]
fn deadlines_limits_and_networks_are_those_of_the_new_file() {
    let node = Node::start("");
    let mut open = node.weir.connect();
    assert_eq!(open.post("/x", b"{\"a\":1}").status, 201);
    node.reload("[deadlines]\nhead = \"50ms\"\n[limits]\nrequests_per_connection = 3\n");
    let mut slow = node.weir.connect();
    slow.send(b"POST /x HTT");
    assert_eq!(slow.reply().status, 408);
    // Requests of before count too.
    assert!(!open.post("/x", b"{\"a\":1}").closes());
    assert!(open.post("/x", b"{\"a\":1}").closes());
    open.expect_end();
    let (changed, _) = node.reload("[[route]]\nallow = [\"10.0.0.0/8\"]\n");
    assert!(
        changed
            .as_array()
            .unwrap()
            .contains(&json!("route[/*].allow"))
    );
    assert_eq!(node.weir.connect().post("/x", b"{\"a\":1}").status, 403);
    // A connection that is open keeps the place that it has, and the next one finds none.
    node.reload("");
    let mut open = node.weir.connect();
    assert_eq!(open.post("/x", b"{\"a\":1}").status, 201);
    node.weir.wait_for_metric("weir_connections 1");
    node.reload("[limits]\nconnections_per_address = 1\n");
    let deadline = Instant::now() + PATIENCE;
    // Connections are spread over the cores: one goes to that of the first in the end.
    let refused = loop {
        assert!(Instant::now() < deadline, "no connection is refused");
        let mut next = node.weir.connect();
        next.send(&request("/x", b"{\"a\":1}"));
        let reply = next.reply();
        if reply.status == 429 {
            break reply;
        }
        assert_eq!(reply.status, 201);
    };
    assert_eq!(refused.json()["code"], "too_many_connections");
    assert_eq!(open.post("/x", b"{\"a\":1}").status, 201);
}

#[test]
fn proxies_are_taken_and_given_up_for_the_connections_that_follow() {
    let node = Node::start("");
    let listener = |more: &str| {
        let address = "address = \"127.0.0.1:0\"\n";
        // The first is the listener's.
        node.base.replacen(address, &format!("{address}{more}"), 1)
    };
    let mut open = node.weir.connect();
    assert_eq!(open.post("/x", b"{\"a\":1}").status, 201);
    node.write_file("weir.toml", &listener("proxies = [\"127.0.0.1\"]\n"));
    let outcome = node.post_reload().json();
    assert_eq!(outcome["changed"], json!(["listener[127.0.0.1:0].proxies"]));
    assert_eq!(node.weir.connect().post("/x", b"{\"a\":1}").status, 400);
    let mut proxy = node.weir.connect();
    proxy.send(b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n");
    assert_eq!(proxy.post("/x", b"{\"a\":1}").status, 201);
    assert_eq!(open.post("/x", b"{\"a\":1}").status, 201);
    // This one was taken for a proxy's, and waits for its header while that changes.
    let mut waiting = node.weir.connect();
    waiting.send(b"PROXY TCP4 10.0.0.3 ");
    node.weir
        .wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
    node.reload("");
    waiting.send(b"10.0.0.2 1 2\r\n");
    assert_eq!(waiting.post("/x", b"{\"a\":1}").status, 201);
    assert_eq!(node.weir.connect().post("/x", b"{\"a\":1}").status, 201);
}

#[test]
fn batches_are_sealed_at_the_new_age() {
    let node = Node::start("");
    let base = node.base.replace("max_age = \"200ms\"", "max_age = \"1h\"");
    node.write_file("weir.toml", &base);
    assert_eq!(
        node.post_reload().json()["changed"],
        json!(["batch.max_age"])
    );
    let mut client = node.weir.connect();
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    // Ten ages of before.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(node.weir.metric("weir_batches_sealed_total"), 0);
    node.reload("");
    node.weir.wait_for_metric("weir_delivered_rows_total 1");
}

#[test]
fn what_needs_a_restart_is_named_and_stays_as_it_was() {
    let node = Node::start("[[route]]\npath = \"/a\"\n");
    let more = "[compression]\nlevel = 9\n[slabs]\nclasses = [{ size = \"16KiB\", count = 1 }]\n\
                [upload]\nbuffer_count = 9\n[[listener]]\naddress = \"127.0.0.1:9\"\n\
                [response]\nstatus = 200\n[[route]]\npath = \"/a\"\n\
                [[route]]\npath = \"/b\"\n[[route]]\npath = \"/new\"\ntable = \"New\"\n";
    let (changed, needs_restart) = node.reload(more);
    assert_eq!(changed, json!(["response.status", "route[/b]"]));
    let named = [
        "compression.level",
        "listener[127.0.0.1:9]",
        "route[/new]",
        "slabs.classes",
        "upload.buffer_count",
    ];
    assert_eq!(needs_restart, json!(named));
    let log = node.weir.log();
    for key in named {
        assert!(log.contains(&format!("{key}: restart to apply")), "{log}");
    }
    let mut client = node.weir.connect();
    assert_eq!(client.post("/b", b"{\"a\":1}").status, 200);
    assert_eq!(client.post("/new", b"{\"a\":1}").status, 404);
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(100_000));
    assert_eq!(client.post("/a", large.as_bytes()).status, 200);
    // It is named again as long as it waits, and is there after the restart.
    assert_eq!(node.reload(more), (json!([]), json!(named)));
    let admin = node.weir.admin;
    let base = node.base.clone();
    let stopped = node.weir.stop();
    let config = format!("{base}{}", more.replace("127.0.0.1:9", "127.0.0.1:0"));
    let weir = Weir::start_in(stopped.directory, &config, admin);
    assert_eq!(weir.connect().post("/new", b"{\"a\":1}").status, 200);
}

#[test]
fn only_a_program_on_this_machine_may_reload() {
    let node = Node::start("");
    let admin = node.weir.admin;
    assert_eq!(node.weir.admin_get("/reload").0, 405);
    for (fields, expected) in [
        (format!("Host: {admin}\r\n"), 200),
        ("Host: localhost:1\r\n".into(), 200),
        ("Host: rebound.example\r\n".into(), 403),
        (
            "Host: localhost\r\nOrigin: http://localhost\r\n".into(),
            403,
        ),
        ("Host: localhost\r\nSec-Fetch-Site: none\r\n".into(), 403),
        (
            "Host: localhost\r\nContent-Type: text/plain\r\n".into(),
            415,
        ),
        // Of a body that never comes nothing is waited for.
        (
            "Host: localhost\r\nContent-Length: 1000000000000\r\n".into(),
            200,
        ),
        (
            "Host: localhost\r\nTransfer-Encoding: chunked\r\n".into(),
            200,
        ),
    ] {
        assert_eq!(post(admin, &fields).status, expected, "{fields}");
    }
    assert_eq!((node.reloads("applied"), node.reloads("rejected")), (4, 0));
}

#[test]
fn without_a_file_there_is_nothing_to_reload() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_weir"))
        .current_dir(directory.path())
        .args(["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--out", "out"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(demo.stdout.take().unwrap()));
    let admin = lines
        .map(|line| line.unwrap())
        .find_map(|line| Some(line.strip_prefix("metrics on http://")?.to_owned()))
        .unwrap();
    let admin = admin.strip_suffix("/metrics").unwrap().parse().unwrap();
    let reply = post(admin, "Host: localhost\r\n");
    demo.kill().unwrap();
    demo.wait().unwrap();
    assert_eq!(reply.status, 400);
    assert!(reply.body.contains("without --config"), "{reply:?}");
}
