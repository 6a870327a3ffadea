//! Clients that nobody here wrote, against the running program: curl, h2load, nghttp, httpx, and slowhttptest as the attacker.
//!
//! What each of them was told to be accepted must be the rows of the table, record by record; then the connections are
//! gone and the slabs are free.
//! They are no part of a plain `cargo test`, because they need programs of the distribution: `.ci/run` installs and
//! runs them.

#[path = "outside_clients/http2.rs"]
mod http2;
#[path = "outside_clients/programs.rs"]
mod programs;
mod support;
#[path = "outside_clients/tls.rs"]
mod tls;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use programs::{Load, Posted, curl, h2load, httpx, openssl_hmac, slowhttptest};
use serde_json::json;
use support::{Client, PATIENCE, Weir, records};
use weir_perf::event;

const SEED: u64 = 5;
const JSON: &str = "Content-Type: application/json";

/// A file for a program, in the directory of the weir that it talks to.
fn file(weir: &Weir, name: &str, text: &str) -> PathBuf {
    let path = weir.directory.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

/// What a client has to read back of `records`, in any order.
fn compacted<'a>(records: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut compacted: Vec<String> = records.into_iter().map(event::compact).collect();
    compacted.sort_unstable();
    compacted
}

/// Waits until no connection is open and no slab is taken; then every acknowledged record must have its one row.
fn assert_accounts(weir: Weir, requests_accepted: u64, acknowledged: Vec<String>) {
    let deadline = Instant::now() + PATIENCE;
    let is_taken = |line: &str| {
        let counts = line.starts_with("weir_connections ")
            || (line.starts_with("weir_slabs{") && !line.contains("state=\"free\""));
        counts && !line.ends_with(" 0")
    };
    while weir.metrics().lines().any(is_taken) {
        assert!(Instant::now() < deadline, "{}", weir.metrics());
    }
    assert_eq!(weir.outcomes()[0], requests_accepted);
    assert_eq!(weir.metric("weir_records_total"), acknowledged.len() as u64);
    weir.assert_accounts_balance();
    let mut found = records(&weir.stop_delivered().rows("Telemetry", "Events"));
    found.sort_unstable();
    // Not assert_eq: nobody reads megabytes.
    assert!(
        found == acknowledged,
        "other records than were acknowledged"
    );
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_posts_in_every_way_of_http_1_1() {
    let weir = Weir::start("");
    let [small, large] = [event::small_event(SEED, 1), event::large_event(SEED, 2)];
    let lines = event::ndjson(SEED, 3, 1_000);
    let mut acknowledged = Vec::new();
    let mut requests = 0;
    for (arguments, body, is_continued) in [
        (vec!["--header", JSON, "--data-binary", "@-"], &small, false),
        (vec!["--json", "@-"], &small, false),
        (vec!["--http1.0", "--json", "@-"], &small, false),
        (vec!["--header", JSON, "--data-binary", "@-"], &large, false),
        (
            vec![
                "--header",
                "Content-Type: application/x-ndjson",
                "--data-binary",
                "@-",
            ],
            &lines,
            false,
        ),
        // Chunked, as curl sends what it does not know the size of; it asks first.
        (
            vec!["--request", "POST", "--upload-file", "-"],
            &large,
            true,
        ),
        (vec!["--upload-file", "-"], &lines, true),
        (
            vec![
                "--header",
                JSON,
                "--header",
                "Transfer-Encoding: chunked",
                "--data-binary",
                "@-",
            ],
            &large,
            false,
        ),
        (
            vec![
                "--header",
                JSON,
                "--header",
                "Transfer-Encoding: chunked",
                "--data-binary",
                "@-",
            ],
            &small,
            false,
        ),
        (
            vec![
                "--header",
                JSON,
                "--header",
                "Expect: 100-continue",
                "--data-binary",
                "@-",
            ],
            &large,
            true,
        ),
        (
            vec![
                "--header",
                JSON,
                "--header",
                "Transfer-Encoding: chunked",
                "--header",
                "Expect: 100-continue",
                "--data-binary",
                "@-",
            ],
            &lines,
            true,
        ),
    ] {
        let url = format!("http://{}/x", weir.address);
        let run = curl(&[&arguments[..], &[&url]].concat(), body.as_bytes());
        assert_eq!(
            (run.code, run.statuses()),
            (0, vec![201]),
            "{arguments:?}: {run:?}"
        );
        let all: Vec<&str> = match body.as_str() {
            body if std::ptr::eq(body, lines.as_str()) => body.lines().collect(),
            body => vec![body],
        };
        assert_eq!(
            run.transfers[0].body,
            format!("{{\"accepted\":{}}}\n", all.len())
        );
        assert_eq!(run.was_continued(), is_continued, "{arguments:?}: {run:?}");
        acknowledged.extend(all);
        requests += 1;
    }
    assert_accounts(weir, requests, compacted(acknowledged));
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_that_asks_first_is_refused_before_it_sends_its_body() {
    let mut config = String::from("[slabs]\nclasses = [{ size = \"64KiB\", count = 8 }]\n");
    config.push_str("[[principal]]\nname = \"shop\"\nbearer = [{ env = \"PATH\" }]\n");
    config.push_str(
        "[[route]]\npath = \"/x\"\n[[route]]\npath = \"/shop\"\nprincipals = [\"shop\"]\n",
    );
    let weir = Weir::start(&config);
    let large = event::large_event(SEED, 4);
    for (path, body, status) in [
        ("/nowhere", &large[..9_000], 404),
        ("/nowhere", &large, 404),
        ("/shop", &large[..9_000], 401),
        ("/x", &large, 413),
    ] {
        for more in [&[][..], &["--header", "Transfer-Encoding: chunked"]] {
            if (status, more.len()) == (413, 2) {
                continue; // Without a length that is only known from the body.
            }
            let url = format!("http://{}{path}", weir.address);
            let ask = [
                "--header",
                JSON,
                "--header",
                "Expect: 100-continue",
                "--data-binary",
                "@-",
                &url,
            ];
            let run = curl(&[more, &ask].concat(), body.as_bytes());
            assert_eq!((run.code, run.statuses()), (0, vec![status]), "{run:?}");
            assert!(!run.was_continued(), "{run:?}");
            assert_eq!(run.transfers[0].uploaded, 0, "{run:?}");
        }
    }
    assert_eq!(weir.outcomes(), [0, 7, 0, 0]);
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_keeps_its_connection_over_answers_of_all_kinds() {
    let weir = Weir::start("[[route]]\npath = \"/x/*\"\n");
    let body = event::small_event(SEED, 6);
    let path = file(&weir, "body", &body);
    let data = format!("@{}", path.display());
    let urls: Vec<String> = ["x/a", "nowhere", "x/b", "x//c", "x/d"]
        .map(|path| format!("http://{}/{path}", weir.address))
        .into();
    let mut arguments = vec!["--path-as-is", "--json", &data];
    arguments.extend(urls.iter().map(String::as_str));
    let run = curl(&arguments, b"");
    let found: Vec<(u16, u32)> = run
        .transfers
        .iter()
        .map(|transfer| (transfer.status, transfer.connects))
        .collect();
    // What could be read in two ways costs the connection.
    assert_eq!(
        found,
        [(201, 1), (404, 0), (201, 0), (400, 0), (201, 1)],
        "{run:?}"
    );
    assert_accounts(weir, 3, compacted([body.as_str(); 3]));
}

#[test]
#[ignore = "needs curl and openssl (apt-get install curl openssl)"]
fn curl_proves_who_it_is() {
    let secrets = tempfile::tempdir().unwrap();
    let secret = |name: &str, text: &str| {
        let path = secrets.path().join(name);
        fs::write(&path, text).unwrap();
        format!("{{ file = {path:?} }}")
    };
    let weir = Weir::start(&format!(
        "[[principal]]\nname = \"shop\"\nbearer = [{}]\n\
         [[principal]]\nname = \"user\"\nbasic = {{ user = \"u\", passwords = [{}] }}\n\
         [[principal]]\nname = \"hub\"\nhmac = {{ secrets = [{}] }}\n\
         [[route]]\npath = \"/shop\"\nprincipals = [\"shop\", \"user\"]\n\
         [[route]]\npath = \"/hub\"\nprincipals = [\"hub\"]\n",
        secret("token", "canary.token-1"),
        secret("password", "canary: pass w\u{f6}rd"),
        secret("key", "canary key"),
    ));
    let body = event::large_event(SEED, 7);
    let path = file(&weir, "body", &body);
    let data = format!("@{}", path.display());
    let signed = |key: &str| format!("X-Hub-Signature-256: sha256={}", openssl_hmac(key, &path));
    let (good, bad) = (signed("canary key"), signed("another key"));
    for (route, arguments, statuses) in [
        ("shop", vec![], vec![401]),
        ("shop", vec!["--oauth2-bearer", "canary.token-1"], vec![201]),
        ("shop", vec!["--oauth2-bearer", "canary.token-2"], vec![401]),
        (
            "shop",
            vec!["--basic", "--user", "u:canary: pass w\u{f6}rd"],
            vec![201],
        ),
        ("shop", vec!["--basic", "--user", "u:canary"], vec![401]),
        // It asks without a body, and answers the challenge.
        (
            "shop",
            vec!["--anyauth", "--user", "u:canary: pass w\u{f6}rd"],
            vec![201],
        ),
        ("hub", vec!["--header", &good], vec![201]),
        ("hub", vec!["--header", &bad], vec![401]),
        ("hub", vec!["--oauth2-bearer", "canary.token-1"], vec![403]),
    ] {
        let url = format!("http://{}/{route}", weir.address);
        let run = curl(&[&arguments[..], &["--json", &data, &url]].concat(), b"");
        assert_eq!(
            (run.code, run.statuses()),
            (0, statuses),
            "{arguments:?}: {run:?}"
        );
    }
    assert_accounts(weir, 4, compacted([body.as_str(); 4]));
}

#[test]
#[ignore = "needs h2load (apt-get install nghttp2-client)"]
fn h2load_posts_over_many_connections_of_http_1_1() {
    let weir = Weir::start("");
    let url = format!("http://{}/x", weir.address);
    let mut acknowledged = Vec::new();
    let mut requests = 0;
    for (name, body, count, connections) in [
        ("small", event::small_event(SEED, 8), 2_000, "100"),
        ("large", event::large_event(SEED, 9), 100, "10"),
    ] {
        let path = file(&weir, name, &body);
        let count_text = count.to_string();
        let load = h2load(&["--h1", "-n", &count_text, "-c", connections, &url], &path);
        assert_eq!(load, Load::all_accepted(count));
        acknowledged.extend(std::iter::repeat_n(event::compact(&body), count as usize));
        requests += count;
    }
    acknowledged.sort_unstable();
    assert_accounts(weir, requests, acknowledged);
}

/// A hundred bodies, every tenth a large one.
fn hundred_events() -> Vec<String> {
    let events = (0..100).map(|index| match index % 10 {
        0 => event::large_event(SEED, index),
        _ => event::small_event(SEED, index),
    });
    events.collect()
}

/// What httpx says where all of `count` bodies were accepted.
fn all_posted(count: usize, version: &str) -> BTreeMap<Posted, usize> {
    let posted = Posted {
        status: 201,
        version: version.into(),
        answer: "{\"accepted\":1}\n".into(),
    };
    [(posted, count)].into()
}

#[test]
#[ignore = "needs httpx: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn httpx_posts_a_hundred_bodies_at_once_over_http_1_1() {
    let weir = Weir::start("");
    let bodies = hundred_events();
    let url = format!("http://{}/x", weir.address);
    let posted = httpx(json!({ "url": url, "http2": false }), &bodies);
    assert_eq!(posted, all_posted(bodies.len(), "HTTP/1.1"));
    assert_accounts(weir, 100, compacted(bodies.iter().map(String::as_str)));
}

/// More attackers than there are slabs.
const ATTACKERS: u64 = 300;

/// Short ones, and more connections from one address than the default has.
const DEADLINES: &str = "[limits]\nconnections_per_address = 1024\nwait = \"10s\"\n\
    [deadlines]\nhead = \"1s\"\nbody_start = \"1s\"\nbody = \"2s\"\nwrite = \"1s\"\nidle = \"2s\"\n";

/// Lets slowhttptest attack, while good requests are sent over a kept connection and over new ones: each is accepted.
///
/// A slab that a slow peer holds is free after a deadline, and whoever waits for one gets it in turn: `limits.wait` is
/// longer than all attackers before a good request can take, and shorter than the attack.
fn good_requests_are_answered_during(mode: &[&str], weir: Weir, url: &str, address: SocketAddr) {
    let good = event::small_event(SEED, 10);
    let is_over = AtomicBool::new(false);
    let connections = ATTACKERS.to_string();
    let general = ["-c", &connections, "-r", "150", "-l", "15", "-p", "10"];
    let (attack, sent) = thread::scope(|scope| {
        let post = |keeps: bool| {
            let (is_over, good) = (&is_over, &good);
            scope.spawn(move || {
                let mut sent = 0_u64;
                let mut kept = Client::connect(address);
                while !is_over.load(Ordering::Relaxed) {
                    if !keeps {
                        kept = Client::connect(address);
                    }
                    let reply = kept.post("/x", good.as_bytes());
                    assert_eq!(reply.status, 201, "{reply:?}");
                    sent += 1;
                }
                sent
            })
        };
        let senders = [post(true), post(false)];
        let attack = slowhttptest(&[mode, &general].concat(), url);
        is_over.store(true, Ordering::Relaxed);
        (attack, senders.map(|sender| sender.join().unwrap()))
    });
    println!("{attack:?}; good requests: {sent:?}");
    assert!(attack.service_available, "{attack:?}");
    assert!(attack.connected_max > 64, "that was no attack: {attack:?}");
    assert!(sent.iter().all(|sent| *sent > 0), "{sent:?}");
    assert!(weir.metric("weir_deadlines_passed_total") > 0);
    let all = sent.iter().sum();
    assert_accounts(weir, all, compacted(vec![good.as_str(); all as usize]));
}

/// The same in clear text.
fn plain_requests_are_answered_during(mode: &[&str]) {
    let weir = Weir::start(DEADLINES);
    let (url, address) = (format!("http://{}/x", weir.address), weir.address);
    good_requests_are_answered_during(mode, weir, &url, address);
}

#[test]
#[ignore = "needs slowhttptest (apt-get install slowhttptest)"]
fn slow_heads_do_not_stop_good_requests() {
    plain_requests_are_answered_during(&["-H", "-i", "1"]);
}

#[test]
#[ignore = "needs slowhttptest (apt-get install slowhttptest)"]
fn slow_bodies_do_not_stop_good_requests() {
    plain_requests_are_answered_during(&["-B", "-i", "1", "-f", "application/json"]);
}

#[test]
#[ignore = "needs slowhttptest (apt-get install slowhttptest)"]
fn slow_readers_do_not_stop_good_requests() {
    // The smallest window there is, ten answers on each connection, five bytes a second taken.
    plain_requests_are_answered_during(&[
        "-X", "-k", "10", "-w", "10", "-y", "20", "-n", "1", "-z", "5",
    ]);
}
