//! HTTP/2 on the wire: honest clients, refusals, and every attack that the front door has a name for.
//!
//! What an attack may cost is asserted for memory and for CPU time: generously, since the machine has other work, and
//! far below what it would cost a server that lets it through.

mod support;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request};

use support::http2::{
    ACK, CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, GOAWAY, HEADERS,
    NO_ERROR, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, REFUSED_STREAM, RST_STREAM, Raw, SETTINGS,
    WINDOW_UPDATE, block, connect, frame, post, post_block, post_headers, run, send,
};
use support::tls::{Authority, Tunnel};
use support::{Client, Weir, base_config, free_address, records};

/// A weir that speaks HTTP/2, with `more` configuration.
fn start(more: &str) -> Weir {
    let admin = free_address();
    let base = base_config(admin).replacen(
        "address = \"127.0.0.1:0\"\n",
        "address = \"127.0.0.1:0\"\nhttp2 = true\n",
        1,
    );
    Weir::start_with(&format!("{base}{more}"), admin)
}

/// A large event: pretty-printed, of about `size` bytes, different for each index.
fn event(index: usize, size: usize) -> String {
    let mut event = format!("{{\n  \"index\": {index},\n  \"items\": [\n");
    while event.len() < size {
        let position = event.len();
        event.push_str(&format!("    {{ \"at\": {position}, \"of\": {index} }},\n"));
    }
    event.push_str("    {}\n  ]\n}\n");
    event
}

fn compact(event: &str) -> String {
    event.split_ascii_whitespace().collect()
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

#[test]
fn a_hundred_streams_with_large_events_share_a_connection() {
    let weir = start("");
    run(async {
        let (client, _connection) = connect(weir.address).await;
        let posts = (0..100).map(|index| {
            let client = client.clone();
            tokio::spawn(async move { post(&client, "/x", event(index, 187_000)).await })
        });
        for post in posts.collect::<Vec<_>>() {
            let answer = post.await.unwrap().unwrap();
            assert_eq!(answer.status, 201, "{answer:?}");
            assert_eq!(answer.body, "{\"accepted\":1}\n");
            assert_eq!(answer.headers["weir-ack"], "durable");
            assert_eq!(answer.headers["content-type"], "application/json");
            assert!(answer.headers.contains_key("date"));
        }
    });
    assert_eq!(weir.outcomes(), [100, 0, 0, 0]);
    let expected: Vec<String> = (0..100)
        .map(|index| compact(&event(index, 187_000)))
        .collect();
    let rows = weir.stop_delivered().rows("Telemetry", "Events");
    assert_eq!(sorted(records(&rows)), sorted(expected));
}

#[test]
fn frames_cut_anywhere_and_bodies_in_frames_of_a_byte_are_the_same_request() {
    let weir = start("");
    let body = event(1, 300);
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, b""));
    bytes.extend(post_headers(1, "/x", &[]));
    for (at, byte) in body.as_bytes().iter().enumerate() {
        let ends = at + 1 == body.len();
        bytes.extend(frame(DATA, u8::from(ends), 1, &[*byte]));
    }
    let mut raw = Raw::connect(weir.address);
    for byte in &bytes {
        raw.send(&[*byte]);
    }
    assert_eq!(raw.answer(1), ("{\"accepted\":1}\n".into(), None));
    // The same at once, and with the head in many pieces.
    let mut raw = Raw::connect(weir.address);
    raw.send(&bytes);
    assert_eq!(raw.answer(1), ("{\"accepted\":1}\n".into(), None));
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, b""));
    let head = post_block("/x", &[("content-length", &body.len().to_string())]);
    bytes.extend(frame(HEADERS, 0, 1, &head[..10]));
    bytes.extend(frame(CONTINUATION, 0, 1, &head[10..50]));
    bytes.extend(frame(CONTINUATION, END_HEADERS, 1, &head[50..]));
    // RFC 9113 §6.1: with padding, which is flow-controlled too.
    let padded = [&[7], body.as_bytes(), &[0; 7]].concat();
    bytes.extend(frame(DATA, END_STREAM | 8, 1, &padded));
    let mut raw = Raw::connect(weir.address);
    raw.send(&bytes);
    assert_eq!(raw.answer(1), ("{\"accepted\":1}\n".into(), None));
    let rows = weir.stop_delivered().rows("Telemetry", "Events");
    assert_eq!(records(&rows), vec![compact(&body); 3]);
}

#[test]
fn a_listener_speaks_both_versions_and_one_without_http2_only_the_first() {
    let weir = start("");
    let mut client = weir.connect();
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    // What begins like the preface and is none.
    let mut client = weir.connect();
    client.send(b"PRI * HTTP/2.1\r\n\r\n");
    assert_eq!(client.reply().status, 505);
    let mut client = weir.connect();
    client.send(b"PR");
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.reply().status, 400);
    // Not behind a request: the version of a connection is said with its first bytes.
    let mut client = weir.connect();
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    client.send(PREFACE);
    assert_eq!(client.reply().status, 505);

    let plain = Weir::start("");
    let mut client = Client::connect(plain.address);
    client.send(PREFACE);
    assert_eq!(client.reply().status, 505);
    client.expect_end();
}

/// All small slabs and all large ones are fewer than the streams that want them.
const FEW_SLABS: &str = "[slabs]\nclasses = [{ size = \"16KiB\", count = 1 }, { size = \"256KiB\", count = 1 }]\n\
                         [limits]\nwait = \"60s\"\n[deadlines]\ncontended = \"1h\"\n";

#[test]
fn streams_that_wait_for_a_slab_do_not_keep_the_one_that_has_it_from_receiving() {
    let weir = start(FEW_SLABS);
    let mut raw = Raw::open(weir.address);
    let body = event(0, 200_000);
    let length = body.len().to_string();
    let (first, rest) = body.as_bytes().split_at(40_000);
    let window = 64 * 1024;
    // Takes the only slab of its size, as its capacity that comes back shows.
    raw.send(&post_headers(1, "/x", &[("content-length", &length)]));
    raw.send_body_part(1, first);
    raw.until(|frame| frame.kind == WINDOW_UPDATE && frame.stream == 1);
    for stream in (3..200).step_by(2) {
        raw.send(&post_headers(stream, "/x", &[("content-length", &length)]));
        raw.send_body_part(stream, &body.as_bytes()[..window]);
    }
    raw.send_body(1, rest, 16 * 1024);
    assert_eq!(raw.answer(1), ("{\"accepted\":1}\n".into(), None));
    // And the others follow, one after the other.
    for stream in (3..200).step_by(2) {
        raw.send_body(stream, &body.as_bytes()[window..], 16 * 1024);
        assert_eq!(raw.answer(stream), ("{\"accepted\":1}\n".into(), None));
    }
    assert_eq!(weir.outcomes(), [100, 0, 0, 0]);
}

#[test]
fn without_a_slab_in_time_a_stream_is_told_so_and_the_connection_goes_on() {
    let weir = start(&FEW_SLABS.replace("60s", "200ms"));
    let mut raw = Raw::open(weir.address);
    let length = ("content-length", "150000");
    raw.send(&post_headers(1, "/x", &[length]));
    raw.send_body_part(1, &[b' '; 40_000]);
    raw.until(|frame| frame.kind == WINDOW_UPDATE && frame.stream == 1);
    raw.send(&post_headers(3, "/x", &[length]));
    raw.send_body_part(3, &[b' '; 20_000]);
    let (body, reset) = raw.answer(3);
    assert!(body.contains("\"busy\""), "{body}");
    assert_eq!(reset, None);
    assert_eq!(
        raw.until(|frame| frame.kind == RST_STREAM).error_code(),
        Some(NO_ERROR)
    );
    // A small one has its own class.
    raw.send(&post_headers(5, "/x", &[]));
    raw.send(&frame(DATA, END_STREAM, 5, b"{}"));
    assert_eq!(raw.answer(5).0, "{\"accepted\":1}\n");
    // A body whose size is not told moves up when it outgrows its slab.
    raw.send(&frame(RST_STREAM, 0, 1, &CANCEL.to_be_bytes()));
    raw.send(&post_headers(7, "/x", &[]));
    raw.send_body(7, event(7, 200_000).as_bytes(), 1_000);
    assert_eq!(raw.answer(7).0, "{\"accepted\":1}\n");
    run(async {
        let (client, _connection) = connect(weir.address).await;
        let answer = post(&client, "/x", vec![b' '; 300_000]).await.unwrap();
        assert_eq!(answer.code(), "body_too_large");
    });
    assert_eq!(weir.outcomes(), [2, 1, 1, 1]);
}

#[test]
fn a_slow_stream_keeps_no_slab_that_somebody_waits_for() {
    let weir = start(&FEW_SLABS.replace("1h", "250ms"));
    let mut raw = Raw::open(weir.address);
    raw.send(&post_headers(1, "/x", &[("content-length", "150000")]));
    raw.send_body_part(1, &[b' '; 40_000]);
    raw.until(|frame| frame.kind == WINDOW_UPDATE && frame.stream == 1);
    let body = event(3, 200_000);
    let length = body.len().to_string();
    raw.send(&post_headers(3, "/x", &[("content-length", &length)]));
    raw.send_body_part(3, &body.as_bytes()[..40_000]);
    assert!(raw.answer(1).0.contains("\"request_timeout\""));
    raw.send_body(3, &body.as_bytes()[40_000..], 16 * 1024);
    assert_eq!(raw.answer(3).0, "{\"accepted\":1}\n");
    assert_eq!(weir.outcomes(), [1, 1, 0, 0]);
}

#[test]
fn what_http_1_1_refuses_is_refused_with_the_same_words() {
    let weir = start(
        "[[principal]]\nname = \"p\"\nbearer = [{ sha256 = \"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\" }]\n\
         [[route]]\npath = \"/x\"\n[[route]]\npath = \"/closed\"\nprincipals = [\"p\"]\n",
    );
    run(async {
        let (client, _connection) = connect(weir.address).await;
        let on = |method: &str, path: &str| {
            Request::builder()
                .method(method)
                .uri(format!("http://test{path}"))
        };
        let json = || Bytes::from_static(b"{\"a\":1}");
        for (request, body, status, code) in [
            (on("POST", "/none"), json(), 404, "no_route"),
            (on("GET", "/x"), Bytes::new(), 405, "method_not_allowed"),
            (on("CONNECT", ""), Bytes::new(), 405, "method_not_allowed"),
            (on("BREW", "/x"), json(), 501, "method_unknown"),
            (on("POST", "/closed"), json(), 401, "unauthenticated"),
            (
                on("POST", "/x").header("expect", "y"),
                json(),
                417,
                "expectation_failed",
            ),
            (
                on("POST", "/x").header("content-type", "text/html"),
                json(),
                415,
                "content_type_unsupported",
            ),
            (
                on("POST", "/x").header("content-encoding", "br"),
                json(),
                415,
                "content_coding_unsupported",
            ),
            (
                on("POST", "/x").header("host", "other"),
                json(),
                400,
                "bad_host",
            ),
            (on("POST", "/x").header("a", " b"), json(), 400, "bad_head"),
            (on("POST", "/x/../y"), json(), 400, "bad_target"),
            (on("POST", "/%zz"), json(), 400, "bad_target"),
            (
                on("POST", "/x").header("a", "b".repeat(16_350)),
                json(),
                431,
                "head_too_large",
            ),
            (
                on("POST", &format!("/{}", "p".repeat(9_000))),
                json(),
                414,
                "request_line_too_large",
            ),
            (
                on("POST", "/x"),
                Bytes::from_static(b"{\"a\":}"),
                400,
                "json_syntax",
            ),
            (on("POST", "/x"), Bytes::new(), 400, "empty_body"),
        ] {
            let request = match request.body(()) {
                Ok(request) => request,
                Err(_) => Request::builder()
                    .method("CONNECT")
                    .uri("test:80")
                    .body(())
                    .unwrap(),
            };
            let answer = send(&client, request, body, None).await.unwrap();
            assert_eq!(
                (answer.status.as_u16(), answer.code().as_str()),
                (status, code),
                "{answer:?}"
            );
            assert_eq!(answer.headers.contains_key("allow"), status == 405);
            assert_eq!(
                answer.headers.contains_key("www-authenticate"),
                status == 401
            );
        }
        // RFC 9110 §9.3.2: an answer to HEAD has no content.
        let answer = send(
            &client,
            on("HEAD", "/x").body(()).unwrap(),
            Bytes::new(),
            None,
        )
        .await
        .unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (405, ""));
        let mut many = on("POST", "/x");
        for index in 0..64 {
            many = many.header(format!("x-{index}"), "v");
        }
        let answer = send(&client, many.body(()).unwrap(), json(), None)
            .await
            .unwrap();
        assert_eq!(answer.code(), "too_many_headers");
        assert_eq!(post(&client, "/x", json()).await.unwrap().status, 201);
    });
    assert_eq!(weir.outcomes(), [1, 18, 0, 0]);
}

#[test]
fn trailers_are_read_and_dropped_or_refused() {
    let weir = start("");
    run(async {
        let (client, _connection) = connect(weir.address).await;
        for (name, value, status) in [
            ("x-sum", "5".to_owned(), 201),
            ("content-length", "7".to_owned(), 400),
            ("authorization", "Bearer x".to_owned(), 400),
            ("x-hub-signature-256", "x".to_owned(), 400),
            ("x-long", "v".repeat(5_000), 431),
        ] {
            let mut trailers = HeaderMap::new();
            trailers.insert(
                http::HeaderName::from_static(name),
                HeaderValue::from_str(&value).unwrap(),
            );
            let request = Request::post("http://test/x").body(()).unwrap();
            let body = Bytes::from_static(b"{\"a\":1}");
            let answer = send(&client, request, body, Some(trailers)).await.unwrap();
            assert_eq!(answer.status, status, "{name} {answer:?}");
        }
    });
    assert_eq!(weir.outcomes(), [1, 4, 0, 0]);
}

#[test]
fn a_client_that_waits_for_100_continue_has_it_once_its_body_is_wanted() {
    let weir = start("");
    let mut raw = Raw::open(weir.address);
    raw.send(&post_headers(1, "/x", &[("expect", "100-continue")]));
    let interim = raw.until(|frame| frame.stream == 1);
    assert_eq!((interim.kind, interim.flags & END_STREAM), (HEADERS, 0));
    raw.send(&frame(DATA, END_STREAM, 1, b"{}"));
    assert_eq!(raw.answer(1), ("{\"accepted\":1}\n".into(), None));
}

#[test]
fn a_refused_body_costs_the_connection_nothing_of_its_window() {
    let weir = start("[[route]]\npath = \"/x\"\n");
    let mut raw = Raw::open(weir.address);
    // Two and a half times the window of the connection.
    let mut stream = 1;
    for _ in 0..500 {
        raw.send(&post_headers(stream, "/none", &[]));
        raw.send_body_until_answered(stream, &[b' '; 16 * 1024]);
        let (body, _) = raw.answer(stream);
        assert!(body.contains("\"no_route\""), "{body}");
        // It stops, as a client does that has its answer; else the stream would be reset in a while.
        raw.send(&frame(DATA, END_STREAM, stream, b""));
        stream += 2;
    }
    let body = event(0, 200_000);
    raw.send(&post_headers(stream, "/x", &[]));
    raw.send_body(stream, body.as_bytes(), 16 * 1024);
    assert_eq!(raw.answer(stream).0, "{\"accepted\":1}\n");
    assert_eq!(weir.outcomes(), [1, 500, 0, 0]);
}

#[test]
fn streams_that_break_their_own_rules_are_reset_and_the_others_go_on() {
    let weir = start("");
    let pseudo = [(":method", "POST"), (":scheme", "http"), (":path", "/x")];
    let with = |more: &[(&str, &str)]| block(&[&pseudo[..], more].concat());
    let blocks = [
        with(&[("Upper", "v")]),
        with(&[("connection", "close")]),
        with(&[("transfer-encoding", "chunked")]),
        with(&[("te", "gzip")]),
        with(&[("x", "a\rb")]),
        with(&[("x", "v"), (":authority", "late")]),
        with(&[(":path", "/twice")]),
        with(&[(":unknown", "v")]),
    ];
    for (index, head) in blocks.iter().enumerate() {
        let mut raw = Raw::open(weir.address);
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, head));
        let end = raw.until(|frame| frame.stream == 1 || frame.kind == GOAWAY);
        assert_eq!(end.error_code(), Some(PROTOCOL_ERROR), "{index}");
    }
    let mut raw = Raw::open(weir.address);
    raw.send(&frame(
        HEADERS,
        END_HEADERS | END_STREAM,
        1,
        &block(&pseudo[..2]),
    ));
    let (body, _) = raw.answer(1);
    assert!(body.contains("\"bad_host\""), "{body}");
    let mut stream = 3;
    // The body is not what content-length says: too long, too short.
    for body in [&b"{\"a\":1}x"[..], b"{\"a\":"] {
        raw.send(&post_headers(stream, "/x", &[("content-length", "7")]));
        raw.send(&frame(DATA, END_STREAM, stream, body));
        let reset = raw.until(|frame| frame.stream == stream);
        assert_eq!(reset.error_code(), Some(PROTOCOL_ERROR));
        stream += 2;
    }
    raw.send(&post_headers(stream, "/x", &[("content-length", "7")]));
    raw.send(&frame(DATA, END_STREAM, stream, b"{\"a\":1}"));
    assert_eq!(raw.answer(stream).0, "{\"accepted\":1}\n");
    let [accepted, _, refused, _] = weir.outcomes();
    assert_eq!((accepted, refused), (1, 0));
    let rows = weir.stop_delivered().rows("Telemetry", "Events");
    assert_eq!(records(&rows), ["{\"a\":1}"]);
}

// --- deadlines, ends ------------------------------------------------------------------------------

#[test]
fn a_body_that_does_not_come_is_answered_408_and_its_stream_reset() {
    let weir = start("[deadlines]\nbody_start = \"200ms\"\nbody_rate_window = \"200ms\"\n");
    let mut raw = Raw::open(weir.address);
    raw.send(&post_headers(1, "/x", &[]));
    raw.send(&post_headers(3, "/x", &[("content-length", "9")]));
    raw.send(&frame(DATA, 0, 3, b"{"));
    // Each its answer, then the reset without an error.
    let mut answered = Vec::new();
    for _ in 0..4 {
        let frame = raw.until(|frame| matches!(frame.kind, DATA | RST_STREAM));
        match frame.kind {
            DATA => {
                let text = String::from_utf8(frame.payload).unwrap();
                assert!(text.contains("\"request_timeout\""), "{text}");
                answered.push(frame.stream);
            }
            _ => {
                assert_eq!(frame.error_code(), Some(NO_ERROR));
                assert!(answered.contains(&frame.stream));
            }
        }
    }
    raw.send(&post_headers(5, "/x", &[]));
    raw.send(&frame(DATA, END_STREAM, 5, b"{}"));
    assert_eq!(raw.answer(5).0, "{\"accepted\":1}\n");
    assert_eq!(weir.outcomes(), [1, 2, 0, 0]);
    assert_eq!(weir.metric("weir_deadlines_passed_total"), 2);
}

#[test]
fn an_idle_connection_is_told_to_go_whether_it_answers_or_not() {
    let weir = start("[deadlines]\nidle = \"200ms\"\nwrite = \"200ms\"\n");
    run(async {
        let (client, connection) = connect(weir.address).await;
        assert_eq!(post(&client, "/x", "{}").await.unwrap().status, 201);
        connection.await.unwrap().unwrap();
    });
    // One that does not answer the PING which asks whether it has seen the first GOAWAY.
    let mut raw = Raw::open(weir.address);
    assert_eq!(raw.go_away(), Some(NO_ERROR));
    assert!(weir.metric("weir_http2_goaways_total{code=\"no_error\"}") >= 4);
    weir.wait_for_metric("weir_http2_connections 0");
    weir.wait_for_metric("weir_connections 0");
}

#[test]
fn a_connection_ends_after_its_last_request() {
    let weir = start("[limits]\nrequests_per_connection = 3\n");
    run(async {
        let (client, connection) = connect(weir.address).await;
        for _ in 0..3 {
            assert_eq!(post(&client, "/x", "{}").await.unwrap().status, 201);
        }
        connection.await.unwrap().unwrap();
        assert!(post(&client, "/x", "{}").await.is_err());
    });
    assert_eq!(weir.outcomes(), [3, 0, 0, 0]);
}

#[test]
fn who_finds_all_places_taken_is_told_so() {
    let weir = start("[http2]\nconnections = 1\nstreams = 2\n");
    let mut first = Raw::open(weir.address);
    let mut second = Raw::connect(weir.address);
    second.send(PREFACE);
    second.send(&frame(SETTINGS, 0, 0, b""));
    assert_eq!(second.go_away(), Some(ENHANCE_YOUR_CALM));
    assert_eq!(weir.metric("weir_http2_connections_refused_total"), 1);
    // HTTP/1.1 still has its own.
    assert_eq!(weir.connect().post("/x", b"{}").status, 201);
    // A third stream is refused, and can be sent again.
    for stream in [1, 3, 5] {
        first.send(&post_headers(stream, "/x", &[]));
    }
    let reset = first.until(|frame| frame.stream == 5);
    assert_eq!(reset.error_code(), Some(REFUSED_STREAM));
    first.send(&frame(DATA, END_STREAM, 3, b"{}"));
    assert_eq!(first.answer(3).0, "{\"accepted\":1}\n");
    drop(first);
    weir.wait_for_metric("weir_http2_connections 0");
    assert_eq!(weir.metric("weir_http2_streams"), 0);
    Raw::open(weir.address);
}

#[test]
fn a_drain_finishes_the_streams_in_flight_and_acknowledges_them() {
    let weir = start("");
    let mut raw = Raw::open(weir.address);
    let mut idle = Raw::open(weir.address);
    raw.send(&post_headers(1, "/x", &[("content-length", "7")]));
    raw.send(&frame(DATA, 0, 1, b"{\"a\""));
    raw.send(&frame(PING, 0, 0, b"received"));
    raw.until(|frame| frame.kind == PING);
    weir.wait_for_metric("weir_http2_streams 1");
    let stopped = std::thread::scope(|scope| {
        let stopping = scope.spawn(move || weir.stop());
        let first = raw.until(|frame| frame.kind == GOAWAY);
        assert_eq!(first.error_code(), Some(NO_ERROR));
        let ping = raw.until(|frame| frame.kind == PING && frame.flags != ACK);
        raw.send(&frame(DATA, END_STREAM, 1, b":1}"));
        assert_eq!(raw.answer(1).0, "{\"accepted\":1}\n");
        // It lasts until the peer has answered the PING, or has had the time for it.
        raw.send(&frame(PING, ACK, 0, &ping.payload));
        assert_eq!(raw.go_away(), Some(NO_ERROR));
        let ping = idle.until(|frame| frame.kind == PING && frame.flags != ACK);
        idle.send(&frame(PING, ACK, 0, &ping.payload));
        assert_eq!(idle.go_away(), Some(NO_ERROR));
        stopping.join().unwrap()
    });
    assert_eq!(records(&stopped.rows("Telemetry", "Events")), ["{\"a\":1}"]);
}

#[test]
fn each_promise_is_kept_before_it_is_said() {
    let weir = start(
        "[[route]]\npath = \"/memory\"\ntable = \"M\"\nack = \"memory\"\n\
         [[route]]\npath = \"/durable\"\ntable = \"D\"\nack = \"durable\"\n\
         [[route]]\npath = \"/delivered\"\ntable = \"L\"\nack = \"delivered\"\n[limits]\nack = \"60s\"\n",
    );
    run(async {
        let (client, _connection) = connect(weir.address).await;
        for ack in ["memory", "durable", "delivered"] {
            let answer = post(&client, &format!("/{ack}"), "{\"a\":1}\n{\"a\":2}")
                .await
                .unwrap();
            assert_eq!(answer.body, "{\"accepted\":2}\n");
            assert_eq!(answer.headers["weir-ack"], ack);
        }
    });
    assert_eq!(weir.outcomes(), [3, 0, 0, 0]);
    weir.assert_accounts_balance();
}

// --- attacks --------------------------------------------------------------------------------------

/// Bytes of resident memory, and CPU time in clock ticks, a hundred a second.
fn usage(weir: &Weir) -> (u64, u64) {
    let read =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", weir.pid())).unwrap();
    let pages: u64 = read("statm").split(' ').nth(1).unwrap().parse().unwrap();
    let stat = read("stat");
    let after_name = stat.rsplit_once(')').unwrap().1;
    let field = |index: usize| -> u64 {
        after_name
            .split(' ')
            .nth(index - 2)
            .unwrap()
            .parse()
            .unwrap()
    };
    (
        pages * rustix::param::page_size() as u64,
        field(14) + field(15),
    )
}

const MEMORY_MAX: u64 = 8 * 1024 * 1024;
const TICKS_MAX: u64 = 1_000;

/// Runs an attack, which has to end its connection, and asserts that it cost little and that requests go on.
fn attack(weir: &Weir, name: &str, attack: impl FnOnce(&Weir)) {
    // What is allocated once, by the first connection and the first request, is not the attack's.
    let serve = || {
        let mut raw = Raw::open(weir.address);
        raw.send(&post_headers(1, "/x", &[]));
        raw.send(&frame(DATA, END_STREAM, 1, b"{}"));
        assert_eq!(raw.answer(1).0, "{\"accepted\":1}\n", "{name}");
    };
    serve();
    let (memory, ticks) = usage(weir);
    attack(weir);
    weir.wait_for_metric("weir_http2_connections 0");
    let (memory_after, ticks_after) = usage(weir);
    assert!(
        memory_after < memory + MEMORY_MAX,
        "{name}: {memory} to {memory_after}"
    );
    assert!(
        ticks_after < ticks + TICKS_MAX,
        "{name}: {ticks} to {ticks_after}"
    );
    serve();
    weir.outcomes();
    weir.wait_for_metric("weir_http2_streams 0");
}

/// Floods a connection with these bytes until it is ended, for what the peer is told.
fn flood(name: &str, bytes: &[u8], count: usize) {
    let weir = start("");
    attack(&weir, name, |weir| {
        let mut raw = Raw::open(weir.address);
        raw.flood(bytes, count);
        raw.end();
        // A peer that is cut off in mid-flood may lose the GOAWAY to its own reset; the count shows that it was sent.
        let code = raw.go_away();
        assert!(
            matches!(code, None | Some(ENHANCE_YOUR_CALM)),
            "{name}: {code:?}"
        );
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1,
        "{name}"
    );
}

#[test]
fn floods_of_frames_that_carry_nothing_end_the_connection() {
    flood("SETTINGS", &frame(SETTINGS, 0, 0, b""), 100_000);
    flood("PING", &frame(PING, 0, 0, b"12345678"), 100_000);
    flood(
        "PRIORITY",
        &frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]),
        100_000,
    );
    flood("unknown", &frame(0x42, 0, 0, b"what"), 100_000);
}

#[test]
fn a_flood_of_window_updates_ends_the_connection() {
    let weir = start("");
    attack(&weir, "WINDOW_UPDATE", |weir| {
        let mut raw = Raw::open(weir.address);
        raw.flood(&frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()), 100_000);
        raw.end();
        raw.go_away();
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

#[test]
fn a_flood_of_empty_data_ends_the_connection() {
    let weir = start("");
    attack(&weir, "empty DATA", |weir| {
        let mut raw = Raw::open(weir.address);
        raw.send(&post_headers(1, "/x", &[]));
        raw.flood(&frame(DATA, 0, 1, b""), 100_000);
        raw.end();
        raw.go_away();
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

/// CVE-2023-44487.
#[test]
fn a_rapid_reset_ends_the_connection() {
    let weir = start("");
    attack(&weir, "rapid reset", |weir| {
        let mut raw = Raw::open(weir.address);
        let mut closed = false;
        for stream in (1..200_001).step_by(2) {
            let mut bytes = post_headers(stream, "/x", &[]);
            bytes.extend(frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()));
            closed = raw.flood(&bytes, 1);
            if closed {
                break;
            }
        }
        raw.end();
        assert!(closed || raw.go_away() == Some(ENHANCE_YOUR_CALM));
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

/// The same, each reset only once weir has looked at the stream.
#[test]
fn a_slow_rapid_reset_ends_the_connection_as_well() {
    let weir = start("");
    attack(&weir, "slow rapid reset", |weir| {
        let mut raw = Raw::open(weir.address);
        let mut stream = 1;
        let code = loop {
            assert!(stream < 1_000, "201 resets in 10 s");
            raw.flood(&post_headers(stream, "/x", &[]), 1);
            raw.flood(&frame(PING, 0, 0, b"accepted"), 1);
            let Some(seen) =
                std::iter::from_fn(|| raw.next()).find(|frame| matches!(frame.kind, PING | GOAWAY))
            else {
                break None;
            };
            if seen.kind == GOAWAY {
                break seen.error_code();
            }
            raw.flood(&frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()), 1);
            stream += 2;
        };
        assert!(stream > 300, "{stream}");
        assert!(matches!(code, None | Some(ENHANCE_YOUR_CALM)), "{code:?}");
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

/// CVE-2025-8671: streams that weir has to reset because of what the peer sends.
#[test]
fn making_weir_reset_streams_ends_the_connection() {
    let weir = start("");
    attack(&weir, "made resets", |weir| {
        let mut raw = Raw::open(weir.address);
        let zero = 0_u32.to_be_bytes();
        for stream in (1..20_001).step_by(2) {
            let mut bytes = post_headers(stream, "/x", &[]);
            // RFC 9113 §6.9: an increment of 0 is an error of the stream.
            bytes.extend(frame(WINDOW_UPDATE, 0, stream, &zero));
            if raw.flood(&bytes, 1) {
                break;
            }
        }
        raw.end();
        raw.go_away();
    });
    let page = weir.metrics();
    let ended = ["enhance_your_calm", "protocol_error"]
        .map(|code| weir.metric(&format!("weir_http2_goaways_total{{code=\"{code}\"}}")));
    assert_eq!(ended.iter().sum::<u64>(), 1, "{page}");
}

#[test]
fn more_streams_than_allowed_are_refused_and_then_the_connection_ends() {
    let weir = start("");
    attack(&weir, "too many streams", |weir| {
        let mut raw = Raw::open(weir.address);
        for stream in (1..10_001).step_by(2) {
            if raw.flood(&post_headers(stream, "/x", &[]), 1) {
                break;
            }
        }
        raw.end();
        raw.go_away();
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

/// CVE-2024-27316.
#[test]
fn a_head_without_an_end_ends_the_connection() {
    for payload in [&b""[..], &block(&[("x", &"v".repeat(100))])] {
        let weir = start("");
        attack(&weir, "CONTINUATION", |weir| {
            let mut raw = Raw::open(weir.address);
            raw.send(&frame(HEADERS, 0, 1, &post_block("/x", &[])));
            raw.flood(&frame(CONTINUATION, 0, 1, payload), 100_000);
            raw.end();
            raw.go_away();
        });
        assert_eq!(
            weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
            1
        );
    }
}

#[test]
fn a_head_that_trickles_has_one_deadline() {
    let weir = start("[deadlines]\nhead = \"300ms\"\n");
    for begun in [
        frame(HEADERS, 0, 1, &post_block("/x", &[])),
        // The header of the frame, and one byte of its payload.
        post_headers(1, "/x", &[])[..10].to_vec(),
    ] {
        attack(&weir, "trickle", |weir| {
            let mut raw = Raw::open(weir.address);
            raw.send(&begun);
            assert_eq!(raw.go_away(), Some(ENHANCE_YOUR_CALM));
        });
    }
    assert_eq!(weir.metric("weir_deadlines_passed_total"), 2);
}

/// A field of 4 KB in HPACK's table, named by one byte again and again.
#[test]
fn a_head_that_grows_when_it_is_decompressed_ends_the_connection() {
    let weir = start("");
    attack(&weir, "HPACK bomb", |weir| {
        let mut raw = Raw::open(weir.address);
        let mut head = post_block("/x", &[]);
        // RFC 7541 §6.2.1: a literal with incremental indexing; then index 62, its first dynamic one.
        head.push(0x40);
        head.extend_from_slice(&block(&[("x", &"v".repeat(3_900))])[1..]);
        head.extend(vec![0x80 | 62; 12_000]);
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &head));
        raw.end();
        raw.go_away();
    });
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
}

#[test]
fn a_header_section_that_is_too_large_is_431() {
    let weir = start("");
    run(async {
        let (client, _connection) = connect(weir.address).await;
        let request = Request::post("http://test/x")
            .header("a", "b".repeat(10_000))
            .header("c", "d".repeat(10_000));
        let request = request.body(()).unwrap();
        let answer = send(&client, request, Bytes::new(), None).await.unwrap();
        assert_eq!(answer.status, 431);
        assert_eq!(post(&client, "/x", "{}").await.unwrap().status, 201);
    });
}

#[test]
fn a_peer_without_a_window_loses_its_stream_and_one_that_does_not_read_its_connection() {
    let weir = start("[deadlines]\nwrite = \"300ms\"\n");
    // SETTINGS_INITIAL_WINDOW_SIZE of 0: no content can be sent.
    let mut raw = Raw::open_with(weir.address, &[0, 4, 0, 0, 0, 0]);
    raw.send(&post_headers(1, "/x", &[]));
    raw.send(&frame(DATA, END_STREAM, 1, b"{}"));
    assert_eq!(raw.answer(1), (String::new(), Some(CANCEL)));
    // A window of a byte at a time is a window.
    raw.send(&post_headers(3, "/x", &[]));
    raw.send(&frame(DATA, END_STREAM, 3, b"{}"));
    raw.until(|frame| frame.stream == 3 && frame.kind == HEADERS);
    let mut content = Vec::new();
    while !content.ends_with(b"\n") {
        raw.send(&frame(WINDOW_UPDATE, 0, 3, &1_u32.to_be_bytes()));
        let data = raw.until(|frame| frame.stream == 3 && frame.kind == DATA);
        assert!(data.payload.len() <= 1);
        content.extend(data.payload);
    }
    assert_eq!(content, b"{\"accepted\":1}\n");
    drop(raw);
    weir.wait_for_metric("weir_http2_connections 0");
    let passed = weir.metric("weir_deadlines_passed_total");
    attack(&weir, "no reading", |weir| {
        let mut raw = Raw::connect_with_small_buffer(weir.address);
        raw.send(PREFACE);
        raw.send(&frame(SETTINGS, 0, 0, b""));
        // Answers fill the socket until nothing can be written. Never more at a time than there may be streams.
        let before = weir.metric("weir_requests_received_total");
        let received = || weir.metric("weir_requests_received_total") - before;
        let mut sent = 0;
        while weir.metric("weir_deadlines_passed_total") == passed {
            if received() < sent {
                continue;
            }
            for _ in 0..50 {
                let mut bytes = post_headers(2 * sent as u32 + 1, "/x", &[]);
                bytes[4] |= END_STREAM;
                raw.flood(&bytes, 1);
                sent += 1;
            }
        }
    });
}

// --- over TLS -------------------------------------------------------------------------------------

/// A weir whose only listener speaks HTTP/2 over TLS where `http2` says so; who signed its certificate.
fn start_tls(http2: bool, tls: &str, more: &str) -> (Weir, Authority) {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    authority.server(1).write(directory.path());
    std::fs::write(directory.path().join("ca.pem"), &authority.pem).unwrap();
    let admin = free_address();
    let listener = "address = \"127.0.0.1:0\"\n";
    let keys = format!(
        "{listener}http2 = {http2}\ntls = {{ certificate = \"tls.crt\", key = \"tls.key\"{tls} }}\n"
    );
    let base = base_config(admin).replacen(listener, &keys, 1);
    let weir = Weir::start_in(directory, &format!("{base}{more}"), admin);
    (weir, authority)
}

fn offering(mut config: rustls::ClientConfig, protocols: &[&str]) -> rustls::ClientConfig {
    config.alpn_protocols = protocols
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect();
    config
}

/// What a handshake with these offers agrees on; an error where it fails.
fn agreed(
    weir: &Weir,
    authority: &Authority,
    protocols: &[&str],
) -> std::io::Result<Option<String>> {
    let config = offering(authority.config(None), protocols);
    let mut connection = support::tls::connection(&std::sync::Arc::new(config));
    let mut stream = std::net::TcpStream::connect(weir.address).unwrap();
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    let name = connection.alpn_protocol();
    Ok(name.map(|name| String::from_utf8(name.to_vec()).unwrap()))
}

#[test]
fn over_tls_http2_is_agreed_on_where_the_listener_speaks_it_and_has_room() {
    let (weir, authority) = start_tls(true, "", "[http2]\nconnections = 1\nstreams = 2\n");
    let both = &["h2", "http/1.1"];
    assert_eq!(
        agreed(&weir, &authority, both).unwrap().as_deref(),
        Some("h2")
    );
    weir.wait_for_metric("weir_http2_connections 0");
    let http = |name: &str| Some(name.to_owned());
    assert_eq!(
        agreed(&weir, &authority, &["http/1.1"]).unwrap(),
        http("http/1.1")
    );
    assert_eq!(agreed(&weir, &authority, &[]).unwrap(), None);
    let tunnel = Tunnel::open(
        weir.address,
        offering(authority.config(None), both),
        16 * 1024,
    );
    let taken = Raw::open(tunnel.address);
    assert_eq!(agreed(&weir, &authority, both).unwrap(), http("http/1.1"));
    assert!(agreed(&weir, &authority, &["h2"]).is_err());
    drop(taken);
    let (plain, authority) = start_tls(false, "", "");
    assert_eq!(agreed(&plain, &authority, both).unwrap(), http("http/1.1"));
    assert!(agreed(&plain, &authority, &["h2"]).is_err());
}

#[test]
fn over_tls_streams_are_served_whatever_the_records() {
    let (weir, authority) = start_tls(true, "", "");
    for record_size in [16 * 1024, 1_000, 7] {
        let config = offering(authority.config(None), &["h2"]);
        let tunnel = Tunnel::open(weir.address, config, record_size);
        let (count, size) = if record_size > 7 {
            (20, 187_000)
        } else {
            (3, 2_000)
        };
        run(async {
            let (client, connection) = connect(tunnel.address).await;
            let posts = (0..count).map(|index| {
                let client = client.clone();
                tokio::spawn(async move { post(&client, "/x", event(index, size)).await })
            });
            for post in posts.collect::<Vec<_>>() {
                let answer = post.await.unwrap().unwrap();
                assert_eq!(answer.body, "{\"accepted\":1}\n");
            }
            drop(client);
            connection.await.unwrap().unwrap();
        });
    }
    weir.wait_for_metric("weir_http2_connections 0");
    assert_eq!(weir.outcomes(), [43, 0, 0, 0]);
    let rows = weir.stop_delivered().rows("Telemetry", "Events");
    let expected = (0..20)
        .flat_map(|index| {
            [
                compact(&event(index, 187_000)),
                compact(&event(index, 187_000)),
            ]
        })
        .chain((0..3).map(|index| compact(&event(index, 2_000))))
        .collect();
    assert_eq!(sorted(records(&rows)), sorted(expected));
}

#[test]
fn over_tls_a_certificate_counts_for_every_stream() {
    let (weir, authority) = start_tls(
        true,
        ", client_ca = \"ca.pem\", client_auth = \"optional\"",
        "[[principal]]\nname = \"p\"\ncertificate = { subjects = [\"CN=known,O=Example\"] }\n\
         [[route]]\npath = \"/*\"\nprincipals = [\"p\"]\n",
    );
    for (name, status) in [(None, 403), (Some("known"), 201), (Some("other"), 403)] {
        let pair = name.map(|name| authority.client(name, 7));
        let config = offering(authority.config(pair.as_ref()), &["h2"]);
        let tunnel = Tunnel::open(weir.address, config, 16 * 1024);
        run(async {
            let (client, _connection) = connect(tunnel.address).await;
            for _ in 0..2 {
                let answer = post(&client, "/x", "{}").await.unwrap();
                assert_eq!(answer.status, status, "{name:?} {answer:?}");
            }
        });
    }
}

#[test]
fn over_tls_floods_and_idle_connections_end_as_they_do_in_clear_text() {
    let (weir, authority) = start_tls(
        true,
        "",
        "[deadlines]\nidle = \"300ms\"\nwrite = \"300ms\"\n",
    );
    let config = offering(authority.config(None), &["h2"]);
    let tunnel = Tunnel::open(weir.address, config, 16 * 1024);
    let mut raw = Raw::open(tunnel.address);
    assert_eq!(raw.go_away(), Some(NO_ERROR));
    let mut raw = Raw::open(tunnel.address);
    raw.flood(&frame(PING, 0, 0, b"12345678"), 100_000);
    raw.end();
    raw.go_away();
    weir.wait_for_metric("weir_http2_connections 0");
    assert_eq!(
        weir.metric("weir_http2_goaways_total{code=\"enhance_your_calm\"}"),
        1
    );
    let mut raw = Raw::open(tunnel.address);
    raw.send(&post_headers(1, "/x", &[]));
    raw.send(&frame(DATA, END_STREAM, 1, b"{}"));
    assert_eq!(raw.answer(1).0, "{\"accepted\":1}\n");
    drop(raw);
    weir.wait_for_metric("weir_http2_streams 0");
    weir.wait_for_metric("weir_connections 0");
}
