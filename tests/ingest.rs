//! weir as its senders see it: what they post is what the blobs hold, and what is refused is not in them.

mod support;

use std::collections::BTreeMap;

use proptest::prelude::*;
use support::{Client, Weir, chunked_request, noise, records, request, rows, unwrap_row};

fn compact(text: &str) -> String {
    serde_json::from_str::<serde_json::Value>(text)
        .unwrap()
        .to_string()
}

#[test]
fn every_form_of_json_becomes_one_row_per_record() {
    let weir = Weir::start("");
    let mut client = weir.connect();
    for (body, accepted) in [
        ("{\"a\":1}", 1),
        ("{ \"b\" : [ 1 , 2.50 , -0 , 1e999 ] }", 1),
        ("[{\"c\":1}, {\"c\":2},\n{\"c\":3}]", 3),
        ("{\"d\":1}\n{\"d\":2}\r\n{\"d\":3}\n", 3),
        ("{\"e\":1}{\"e\":2}", 2),
        ("[1, \"two\", null, [3], {}]", 5),
        ("[]", 0),
        ("{\"k\":1,\"k\":2,\"\\u00e9\":\"\\ud800 é\"}", 1),
    ] {
        let reply = client.post("/x", body.as_bytes());
        assert_eq!(reply.status, 201, "{reply:?}");
        assert_eq!(reply.json()["accepted"], accepted, "{body}");
    }
    assert_eq!(weir.outcomes(), [8, 0, 0, 0]);
    assert_eq!(weir.metric("weir_records_total"), 16);
    let stopped = weir.stop_delivered();
    assert_eq!(
        records(&stopped.rows("Telemetry", "Events")),
        [
            "{\"a\":1}",
            "{\"b\":[1,2.50,-0,1e999]}",
            "{\"c\":1}",
            "{\"c\":2}",
            "{\"c\":3}",
            "{\"d\":1}",
            "{\"d\":2}",
            "{\"d\":3}",
            "{\"e\":1}",
            "{\"e\":2}",
            "1",
            "\"two\"",
            "null",
            "[3]",
            "{}",
            "{\"k\":1,\"k\":2,\"\\u00e9\":\"\\ud800 é\"}",
        ]
    );
}

#[test]
fn the_envelope_has_the_time_of_receipt_and_the_paths_tag() {
    let weir = Weir::start("");
    let before = jiff::Timestamp::now();
    weir.connect().post("/github/push?x=1", b"{\"a\":1}");
    weir.connect().post("/", b"{\"a\":2}");
    let after = jiff::Timestamp::now();
    let rows = weir.stop_delivered().rows("Telemetry", "Events");
    let tags: Vec<String> = rows.iter().map(|row| unwrap_row(row).0).collect();
    assert_eq!(tags, ["github_push", "http.0"]);
    for row in rows {
        let row: serde_json::Value = serde_json::from_str(&row).unwrap();
        let at: jiff::Timestamp = row["timestamp"].as_str().unwrap().parse().unwrap();
        assert!(at.as_millisecond() >= before.as_millisecond() && at <= after);
    }
}

#[test]
fn routes_pick_the_table_and_the_envelope_and_nothing_of_the_request_does() {
    let weir = Weir::start(
        "[[route]]\npath = \"/plain/*\"\ndatabase = \"D\"\ntable = \"Plain\"\nenvelope = \"none\"\n\
         [[route]]\npath = \"/exact\"\ndatabase = \"D\"\ntable = \"Exact\"\n",
    );
    let mut client = weir.connect();
    assert_eq!(client.post("/plain/../../etc", b"{\"a\":1}").status, 201);
    assert_eq!(client.post("/exact", b"{\"a\":2}").status, 201);
    let nowhere = client.post("/else", b"");
    assert_eq!((nowhere.status, nowhere.closes()), (404, false));
    let scalar = client.post("/plain/x", b"[1]");
    assert_eq!(scalar.json()["code"], "record_not_object");
    let stopped = weir.stop_delivered();
    assert_eq!(stopped.rows("D", "Plain"), ["{\"a\":1}"]);
    assert_eq!(records(&stopped.rows("D", "Exact")), ["{\"a\":2}"]);
}

#[test]
fn what_is_not_json_is_refused_whole_with_its_place() {
    let weir = Weir::start("");
    let mut client = weir.connect();
    for (body, code, offset, line) in [
        ("{\"a\":1}\n{\"b\":}\n", "json_syntax", 13, 2),
        ("{\"a\":1}\n\n{\"b\":[1,2", "json_truncated", 18, 3),
        ("12", "json_scalar", 0, 1),
        ("", "empty_body", 0, 1),
        (" \n ", "empty_body", 3, 2),
    ] {
        let reply = client.post("/x", body.as_bytes());
        assert_eq!(
            (reply.status, reply.closes()),
            (400, false),
            "{body:?}: {reply:?}"
        );
        let json = reply.json();
        assert_eq!(json["code"], code, "{body:?}");
        assert_eq!(
            (&json["offset"], &json["line"]),
            (&offset.into(), &line.into()),
            "{body:?}"
        );
        assert!(json["detail"].is_string());
    }
    assert_eq!(client.post("/x", b"{\"good\":1}").status, 201);
    assert_eq!(weir.outcomes(), [1, 5, 0, 0]);
    assert_eq!(
        records(&weir.stop_delivered().rows("Telemetry", "Events")),
        ["{\"good\":1}"]
    );
}

#[test]
fn a_stream_of_requests_reads_the_same_however_it_is_cut() {
    let large = format!("{{\"pad\":\"{}\"}}", "x".repeat(40_000));
    let mut wire = Vec::new();
    let mut expected = Vec::new();
    for (index, body) in [
        "{\"n\": 1}",
        "[{\"n\":2},{\"n\":3}]",
        &large,
        "{\"n\":4}\n{\"n\":5}",
    ]
    .into_iter()
    .enumerate()
    {
        wire.extend_from_slice(&match index % 2 {
            0 => request("/p", body.as_bytes()),
            _ => chunked_request("/p", body.as_bytes(), 7),
        });
    }
    wire.extend_from_slice(&chunked_request("/p", large.as_bytes(), 9_000));
    wire.extend_from_slice(&request("/p", b"{\"bad\":"));
    wire.extend_from_slice(b"GET /p HTTP/1.1\r\nHost: test\r\n\r\n");
    wire.extend_from_slice(&request("/p", b"{\"n\":6}"));
    for record in [
        "{\"n\":1}",
        "{\"n\":2}",
        "{\"n\":3}",
        &large,
        "{\"n\":4}",
        "{\"n\":5}",
        &large,
        "{\"n\":6}",
    ] {
        expected.push(record.to_owned());
    }
    let weir = Weir::start(
        "[slabs]\nclasses = [{ size = \"16KiB\", count = 2 }, { size = \"64KiB\", count = 2 }]\n",
    );
    let statuses = [201, 201, 201, 201, 201, 400, 405, 201];
    let serve = |cuts: &[usize]| {
        let mut client = weir.connect();
        let mut sender = client.stream.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut begin = 0;
                for end in cuts.iter().copied().chain([wire.len()]) {
                    std::io::Write::write_all(&mut sender, &wire[begin..end]).unwrap();
                    begin = end;
                }
            });
            for status in statuses {
                assert_eq!(client.reply().status, status);
            }
        });
    };
    let mut streams = 0;
    serve(&[]);
    serve(&(1..400).collect::<Vec<_>>());
    streams += 2;
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig::with_cases(40),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let served = std::cell::Cell::new(0);
    runner
        .run(
            &proptest::collection::btree_set(0..wire.len(), 0..20),
            |cuts| {
                serve(&cuts.into_iter().collect::<Vec<_>>());
                served.set(served.get() + 1);
                Ok(())
            },
        )
        .unwrap();
    streams += served.get();
    assert_eq!(weir.outcomes(), [6 * streams, 2 * streams, 0, 0]);
    let mut counts = BTreeMap::new();
    for record in records(&weir.stop_delivered().rows("Telemetry", "Events")) {
        *counts.entry(record).or_insert(0) += 1;
    }
    let mut expected_counts = BTreeMap::new();
    for record in expected {
        *expected_counts.entry(record).or_insert(0) += streams;
    }
    assert_eq!(counts, expected_counts);
}

#[test]
fn an_expectation_is_met_before_the_body_comes_and_only_if_it_is_wanted() {
    let weir = Weir::start("");
    let mut client = weir.connect();
    let head = |length: usize| {
        format!(
            "PUT /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
        )
    };
    client.send(head(7).as_bytes());
    assert_eq!(client.reply().status, 100);
    client.send(b"{\"a\":1}");
    assert_eq!(client.reply().status, 201);
    client.send(head(1 << 30).as_bytes());
    let too_large = client.reply();
    assert_eq!((too_large.status, too_large.closes()), (413, true));
    client.expect_end();
    assert_eq!(weir.outcomes(), [1, 1, 0, 0]);
}

#[test]
fn persistence_is_what_the_client_asked_for() {
    let weir = Weir::start("");
    let mut client = weir.connect();
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}");
    let reply = client.reply();
    assert!(reply.status == 201 && reply.closes());
    client.expect_end();

    let mut client = weir.connect();
    client.send(b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}");
    assert!(client.reply().closes());
    client.expect_end();

    let mut client = weir.connect();
    for _ in 0..2 {
        client.send(b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}");
        assert!(client.reply().head.contains("Connection: keep-alive"));
    }
}

#[test]
fn malformed_requests_get_one_answer_and_a_close() {
    let weir = Weir::start("");
    for (wire, status) in [
        ("nonsense\r\n\r\n", 400),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n{}",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
            501,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        ("POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", 417),
        ("POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
        ("POST / HTTP/3.0\r\nHost: a\r\n\r\n", 400),
        ("\x16\x03\x01 a TLS client hello", 400),
    ] {
        let mut client = weir.connect();
        client.send(wire.as_bytes());
        let reply = client.reply();
        assert_eq!((reply.status, reply.closes()), (status, true), "{wire:?}");
        assert!(reply.json()["code"].is_string());
        client.expect_end();
    }
    let mut client = weir.connect();
    client.send(format!("POST / HTTP/1.1\r\nX: {}", "y".repeat(20_000)).as_bytes());
    assert_eq!(client.reply().status, 431);
    assert_eq!(weir.outcomes(), [0, 10, 0, 0]);
    assert_eq!(weir.metric("weir_records_total"), 0);
}

#[test]
fn a_stream_that_ends_within_a_request_is_aborted_and_stores_nothing() {
    let weir = Weir::start("");
    for wire in [
        "POST / HTT",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{\"a\":1}",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{\"a\":1}\r\n",
    ] {
        let mut client = weir.connect();
        client.send(wire.as_bytes());
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.reply().json()["code"], "body_truncated", "{wire:?}");
        client.expect_end();
    }
    // Ending between two requests is no request.
    let client = weir.connect();
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(weir.outcomes(), [0, 0, 0, 3]);
    let stopped = weir.stop_delivered();
    assert!(stopped.rows("Telemetry", "Events").is_empty());
}

#[test]
fn sizes_are_bounded_by_slabs_and_by_the_record_limit() {
    let weir = Weir::start(
        "[slabs]\nclasses = [{ size = \"16KiB\", count = 4 }, { size = \"64KiB\", count = 2 }]\n\
         [limits]\nrecord = \"20KiB\"\n",
    );
    let mut client = weir.connect();
    let record = |size: usize| format!("{{\"pad\":\"{}\"}}", "x".repeat(size - 10)).into_bytes();
    assert_eq!(client.post("/x", &record(20 << 10)).status, 201);
    let reply = client.post("/x", &record((20 << 10) + 1));
    assert_eq!((reply.status, reply.closes()), (413, false));
    assert_eq!(reply.json()["code"], "record_too_large");
    for wire in [
        request("/x", &record(70_000)),
        chunked_request("/x", &record(70_000), 5_000),
    ] {
        let mut client = weir.connect();
        // The answer may come before everything is sent.
        let _ = std::io::Write::write_all(&mut client.stream, &wire);
        assert_eq!(client.reply().json()["code"], "body_too_large");
    }
    assert_eq!(weir.outcomes(), [1, 3, 0, 0]);
}

#[test]
fn success_answers_have_the_configured_status() {
    for status in [200, 201, 204] {
        let weir = Weir::start(&format!("[response]\nstatus = {status}\n"));
        let mut client = weir.connect();
        for _ in 0..2 {
            let reply = client.post("/x", b"{}");
            assert_eq!(reply.status, status);
            assert_eq!(reply.body.is_empty(), status == 204);
        }
    }
}

#[test]
fn a_blob_appears_at_max_age_without_a_shutdown() {
    let weir = Weir::start("");
    weir.connect().post("/x", b"{\"a\":1}");
    let directory = weir.directory.path().join("out/Telemetry/Events");
    weir.wait_for_metric("weir_blobs_total 1");
    assert_eq!(records(&rows(&directory)), ["{\"a\":1}"]);
}

#[test]
fn a_full_upload_buffer_makes_a_blob_and_rows_cross_from_one_to_the_next_whole() {
    let weir = Weir::start(
        "[upload]\nbuffer_count = 2\nbuffer_size = \"128KiB\"\n[limits]\nrecord = \"64KiB\"\n",
    );
    let mut client = weir.connect();
    let mut sent = Vec::new();
    let mut noise = noise();
    for index in 0..60 {
        let mut body = String::new();
        for line in 0..400 {
            let number = noise.next().unwrap();
            let record = format!("{{\"i\":{index},\"l\":{line},\"r\":\"{number:x}\"}}");
            body.push_str(&record);
            body.push('\n');
            sent.push(record);
        }
        let reply = client.post("/x", body.as_bytes());
        assert_eq!(reply.json()["accepted"], 400, "{reply:?}");
    }
    let stopped = weir.stop_delivered();
    let directory = stopped.directory.path().join("out/Telemetry/Events");
    assert!(support::blobs(&directory).len() > 1);
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), sent);
}

#[test]
fn without_a_free_upload_buffer_requests_are_refused_and_later_taken_again() {
    // A table's directory that turns into a file makes every write fail until it is repaired.
    let weir = Weir::start(
        "[upload]\nbuffer_count = 2\nbuffer_size = \"128KiB\"\n\
         [limits]\nrecord = \"64KiB\"\nwait = \"50ms\"\n[[route]]\nack = \"memory\"\n",
    );
    let directory = weir.directory.path().join("out/Telemetry/Events");
    std::fs::remove_dir(&directory).unwrap();
    std::fs::write(&directory, b"in the way").unwrap();
    let mut client = weir.connect();
    let mut accepted = Vec::new();
    let mut refused = 0;
    let mut noise = noise();
    for index in 0..400 {
        let mut pad = String::new();
        for _ in 0..1_000 {
            let number = noise.next().unwrap();
            pad.push_str(&format!("{number:x}"));
        }
        let record = format!("{{\"i\":{index},\"pad\":\"{pad}\"}}");
        let reply = client.post("/x", record.as_bytes());
        match reply.status {
            201 => accepted.push(record),
            503 => {
                assert!(reply.head.contains("Retry-After: "), "{reply:?}");
                assert_eq!(
                    (reply.json()["code"].as_str(), reply.closes()),
                    (Some("busy"), false)
                );
                refused += 1;
                if refused == 3 {
                    break;
                }
            }
            _ => panic!("{reply:?}"),
        }
    }
    assert_eq!(refused, 3, "the pool must run out");
    assert_eq!(weir.outcomes(), [accepted.len() as u64, 0, 3, 0]);
    assert_eq!(weir.admin_get("/livez").0, 200);
    std::fs::remove_file(&directory).unwrap();
    std::fs::create_dir(&directory).unwrap();
    let deadline = std::time::Instant::now() + support::PATIENCE;
    loop {
        assert!(std::time::Instant::now() < deadline, "it never recovered");
        let record = "{\"after\":1}";
        if client.post("/x", record.as_bytes()).status == 201 {
            accepted.push(record.to_owned());
            break;
        }
    }
    let stopped = weir.stop_delivered();
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), accepted);
}

#[test]
fn without_a_free_slab_a_request_waits_and_then_is_refused() {
    let weir = Weir::start(
        "[slabs]\nclasses = [{ size = \"16KiB\", count = 1 }, { size = \"2MiB\", count = 1 }]\n\
         [limits]\nwait = \"50ms\"\n",
    );
    // The first sender holds the only small slab in mid-head.
    let mut holder = weir.connect();
    holder.send(b"POST / HTTP/1.1\r\n");
    weir.wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
    let mut waiter = weir.connect();
    waiter.send(&request("/x", b"{}"));
    let reply = waiter.reply();
    assert!(reply.status == 503 && reply.closes(), "{reply:?}");
    holder.send(b"Host: a\r\nContent-Length: 2\r\n\r\n{}");
    assert_eq!(holder.reply().status, 201);
    assert_eq!(weir.connect().post("/x", b"{}").status, 201);
    assert_eq!(weir.outcomes(), [2, 0, 1, 0]);
}

#[test]
fn beyond_the_limit_of_connections_the_next_waits_until_one_ends() {
    let weir = Weir::start("[limits]\nconnections = 2\n");
    let mut first = weir.connect();
    let mut second = weir.connect();
    assert_eq!(first.post("/x", b"{}").status, 201);
    assert_eq!(second.post("/x", b"{}").status, 201);
    // The kernel takes it, weir does not yet.
    let mut third = weir.connect();
    third.send(&request("/x", b"{}"));
    assert_eq!(second.post("/x", b"{}").status, 201);
    assert_eq!(weir.metric("weir_connections_accepted_total"), 2);
    drop(first);
    assert_eq!(third.reply().status, 201);
    assert_eq!(weir.outcomes(), [4, 0, 0, 0]);
}

#[test]
fn idle_connections_hold_no_slab() {
    let weir = Weir::start(
        "[slabs]\nclasses = [{ size = \"16KiB\", count = 1 }]\n[limits]\nrecord = \"8KiB\"\n",
    );
    let mut clients: Vec<Client> = (0..50).map(|_| weir.connect()).collect();
    for _ in 0..2 {
        for client in &mut clients {
            assert_eq!(client.post("/x", b"{}").status, 201);
        }
    }
    assert_eq!(weir.metric("weir_connections"), 50);
    assert_eq!(weir.outcomes(), [100, 0, 0, 0]);
}

#[test]
fn a_drain_finishes_the_request_in_flight_and_refuses_new_connections() {
    let weir = Weir::start("");
    let idle = weir.connect();
    let mut busy = weir.connect();
    busy.send(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n{\"a\"");
    weir.wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
    let address = weir.address;
    let admin = weir.admin;
    let stopping = std::thread::spawn(move || weir.stop());
    // The listener is gone once the node drains.
    let deadline = std::time::Instant::now() + support::PATIENCE;
    while std::net::TcpStream::connect(address).is_ok() {
        assert!(std::time::Instant::now() < deadline, "it still accepts");
    }
    let mut client = Client::connect(admin);
    client.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(client.reply().status, 503);
    busy.send(b":1}");
    let reply = busy.reply();
    assert!(reply.status == 201 && reply.closes(), "{reply:?}");
    drop(idle);
    let stopped = stopping.join().unwrap();
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"a\":1}"]);
}

#[test]
fn a_drain_cuts_who_stalls_and_delivers_what_was_accepted() {
    let weir = Weir::start(
        "[limits]\ndrain = \"200ms\"\n[slabs]\nclasses = [{ size = \"16KiB\", count = 2 }]\n",
    );
    let mut stalled = weir.connect();
    stalled.send(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n{\"a\"");
    weir.wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
    assert_eq!(weir.connect().post("/x", b"{\"b\":1}").status, 201);
    let stopped = weir.stop();
    assert!(
        stopped.stderr.contains("cutting connections"),
        "{}",
        stopped.stderr
    );
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"b\":1}"]);
}

#[test]
fn a_drain_that_cannot_deliver_what_is_in_memory_alone_says_what_is_lost() {
    let weir = Weir::start("[limits]\ndrain = \"100ms\"\n[[route]]\nack = \"memory\"\n");
    let directory = weir.directory.path().join("out/Telemetry/Events");
    std::fs::remove_dir(&directory).unwrap();
    std::fs::write(&directory, b"in the way").unwrap();
    assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
    let (code, stderr) = weir.terminate();
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr
            .lines()
            .last()
            .unwrap()
            .starts_with("weir: 1 sealed batches that were in memory alone were not delivered"),
        "{stderr}"
    );
}

#[test]
fn the_answer_to_head_has_no_content() {
    let weir = Weir::start("");
    let mut client = weir.connect();
    client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    client.send(&request("/x", b"{}"));
    // The next answer begins right behind the head of the first.
    let mut head = [0; 4];
    let mut received = Vec::new();
    while !received.ends_with(b"\r\n\r\n") {
        std::io::Read::read_exact(&mut client.stream, &mut head[..1]).unwrap();
        received.push(head[0]);
    }
    assert!(
        received.starts_with(b"HTTP/1.1 405 "),
        "{}",
        received.escape_ascii()
    );
    assert_eq!(client.reply().status, 201);
}

#[test]
fn the_large_event_comes_back_as_it_was_sent() {
    let weir = Weir::start("");
    let mut events: Vec<String> = (0..3)
        .map(|index| weir_perf::event::large_event(7, index))
        .collect();
    if let Ok(sample) = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../shared/data/sample_trigger.json"
    )) {
        events.push(sample);
    }
    let mut client = weir.connect();
    for event in &events {
        assert_eq!(client.post("/x", event.as_bytes()).status, 201);
        client.send(&chunked_request("/x", event.as_bytes(), 10_000));
        assert_eq!(client.reply().status, 201);
    }
    let records = records(&weir.stop_delivered().rows("Telemetry", "Events"));
    assert_eq!(records.len(), 2 * events.len());
    for (index, record) in records.iter().enumerate() {
        assert_eq!(compact(record), compact(&events[index / 2]));
        assert_eq!(record.len(), compact_size(&events[index / 2]));
    }
}

/// Bytes of the text without insignificant whitespace, counted without parsing it.
fn compact_size(text: &str) -> usize {
    let mut in_string = false;
    let mut escaped = false;
    text.bytes()
        .filter(|byte| {
            let kept = in_string || !byte.is_ascii_whitespace();
            if escaped {
                escaped = false;
            } else if *byte == b'\\' {
                escaped = in_string;
            } else if *byte == b'"' {
                in_string = !in_string;
            }
            kept
        })
        .count()
}
