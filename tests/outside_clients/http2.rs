//! Over HTTP/2, by prior knowledge and by ALPN: one connection with many streams.

use serde_json::json;

use super::programs::{Load, curl, h2load, httpx, nghttp};
use super::support::tls::Authority;
use super::support::{Weir, base_config, free_address};
use super::{SEED, all_posted, assert_accounts, compacted, file, tls};
use weir_perf::event;

/// A weir that speaks HTTP/2 as well, in clear text.
fn start(more: &str) -> Weir {
    let admin = free_address();
    let config = base_config(admin).replace("[admin]", "http2 = true\n[admin]");
    Weir::start_with(&format!("{config}{more}"), admin)
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_posts_by_prior_knowledge() {
    let weir = start("");
    let url = format!("http://{}/x", weir.address);
    let (small, large) = (event::small_event(SEED, 1), event::large_event(SEED, 2));
    let lines = event::ndjson(SEED, 3, 1_000);
    let mut acknowledged = Vec::new();
    let mut requests = 0;
    for (arguments, body) in [
        (vec!["--json", "@-"], &small),
        (vec!["--json", "@-"], &large),
        (
            vec![
                "--header",
                "Content-Type: application/x-ndjson",
                "--data-binary",
                "@-",
            ],
            &lines,
        ),
        // Without a length.
        (vec!["--request", "POST", "--upload-file", "-"], &large),
        (vec!["--upload-file", "-"], &lines),
    ] {
        let run = curl(
            &[&arguments[..], &["--http2-prior-knowledge", &url]].concat(),
            body.as_bytes(),
        );
        assert_eq!(
            (run.code, run.statuses()),
            (0, vec![201]),
            "{arguments:?}: {run:?}"
        );
        assert_eq!(run.transfers[0].version, "2");
        let all: Vec<&str> = match body.as_str() {
            body if std::ptr::eq(body, lines.as_str()) => body.lines().collect(),
            body => vec![body],
        };
        assert_eq!(
            run.transfers[0].body,
            format!("{{\"accepted\":{}}}\n", all.len())
        );
        acknowledged.extend(all);
        requests += 1;
    }
    // HTTP/1.1 on the same listener.
    let run = curl(&["--json", &small, &url], b"");
    assert_eq!(
        (run.statuses(), run.transfers[0].version.as_str()),
        (vec![201], "1.1")
    );
    acknowledged.push(&small);
    assert_accounts(weir, requests + 1, compacted(acknowledged));
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_reads_what_was_refused_while_it_sends() {
    let weir = start(
        "[slabs]\nclasses = [{ size = \"64KiB\", count = 8 }]\n\
         [[principal]]\nname = \"shop\"\nbearer = [{ env = \"PATH\" }]\n\
         [[route]]\npath = \"/x\"\n[[route]]\npath = \"/shop\"\nprincipals = [\"shop\"]\n",
    );
    let large = event::large_event(SEED, 4);
    for (path, status) in [("nowhere", 404), ("shop", 401), ("x", 413)] {
        for body in [&large[..9_000], &large] {
            if (status, body.len()) == (413, 9_000) {
                continue; // That fits.
            }
            let url = format!("http://{}/{path}", weir.address);
            let run = curl(
                &["--http2-prior-knowledge", "--json", "@-", &url],
                body.as_bytes(),
            );
            assert_eq!((run.code, run.statuses()), (0, vec![status]), "{run:?}");
        }
    }
    assert_eq!(weir.outcomes(), [0, 5, 0, 0]);
    weir.wait_for_metric("weir_connections 0");
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_agrees_on_http_2_over_tls() {
    let authority = Authority::new();
    let weir = tls::start(&authority, "", "http2 = true\n", "");
    let (url, ca) = (
        format!("https://{}/x", weir.address),
        weir.directory.path().join("ca.pem").display().to_string(),
    );
    let large = event::large_event(SEED, 6);
    for (arguments, version) in [
        (&[][..], "2"),
        (&["--http2"], "2"),
        (&["--http2", "--tls-max", "1.2"], "2"),
        (&["--http1.1"], "1.1"),
        (&["--no-alpn"], "1.1"),
    ] {
        let run = curl(
            &[arguments, &["--cacert", &ca, "--json", "@-", &url]].concat(),
            large.as_bytes(),
        );
        assert_eq!(
            (run.code, run.statuses()),
            (0, vec![201]),
            "{arguments:?}: {run:?}"
        );
        assert_eq!(run.transfers[0].version, version, "{arguments:?}");
    }
    let data = format!("@{}", file(&weir, "large", &large).display());
    // One after the other and all at once, on one connection.
    for more in [&[][..], &["--parallel"]] {
        let mut arguments = [more, &["--cacert", &ca, "--json", &data]].concat();
        arguments.extend([url.as_str(); 8]);
        let run = curl(&arguments, b"");
        assert_eq!(
            (run.code, run.statuses()),
            (0, vec![201; 8]),
            "{more:?}: {run:?}"
        );
        let connects: u32 = run.transfers.iter().map(|transfer| transfer.connects).sum();
        assert_eq!(connects, 1, "{more:?}: {run:?}");
    }
    assert_accounts(weir, 21, compacted([large.as_str(); 21]));
}

/// A hundred streams at a time, with small events and with large ones, on one connection and on several.
fn load(weir: Weir, scheme: &str) {
    let url = format!("{scheme}://{}/x", weir.address);
    let mut acknowledged = Vec::new();
    for (name, body, count, connections) in [
        ("small", event::small_event(SEED, 7), 2_000, "1"),
        ("large", event::large_event(SEED, 8), 200, "1"),
        ("large", event::large_event(SEED, 8), 200, "4"),
    ] {
        let path = file(&weir, name, &body);
        let count_text = count.to_string();
        let load = h2load(
            &["-m", "100", "-n", &count_text, "-c", connections, &url],
            &path,
        );
        assert_eq!(load, Load::all_accepted(count), "{name} over {connections}");
        acknowledged.extend(std::iter::repeat_n(event::compact(&body), count as usize));
    }
    acknowledged.sort_unstable();
    assert_accounts(weir, 2_400, acknowledged);
}

#[test]
#[ignore = "needs h2load (apt-get install nghttp2-client)"]
fn h2load_posts_on_a_hundred_streams() {
    load(start(""), "http");
}

#[test]
#[ignore = "needs h2load (apt-get install nghttp2-client)"]
fn h2load_posts_on_a_hundred_streams_over_tls() {
    load(
        tls::start(&Authority::new(), "", "http2 = true\n", ""),
        "https",
    );
}

#[test]
#[ignore = "needs nghttp (apt-get install nghttp2-client)"]
fn nghttp_posts_on_many_streams() {
    let authority = Authority::new();
    for (weir, scheme) in [
        (start(""), "http"),
        (tls::start(&authority, "", "http2 = true\n", ""), "https"),
    ] {
        let url = format!("{scheme}://{}/x", weir.address);
        let body = event::large_event(SEED, 9);
        let path = file(&weir, "body", &body);
        for (count, more) in [
            ("40", &[][..]),
            ("10", &["--no-content-length", "--no-dep"]),
            ("10", &["--header-table-size", "0"]),
            ("1", &["--expect-continue"]),
            // An answer of 15 bytes, one at a time.
            ("1", &["--window-bits", "1"]),
        ] {
            let answers = nghttp(&[more, &["--multiply", count, &url]].concat(), &path);
            let count: usize = count.parse().unwrap();
            assert_eq!(
                answers,
                "{\"accepted\":1}\n".repeat(count),
                "{scheme} {more:?}"
            );
        }
        assert_accounts(weir, 62, compacted([body.as_str(); 62]));
    }
}

#[test]
#[ignore = "needs httpx: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn httpx_posts_a_hundred_bodies_at_once_on_one_connection() {
    // None is larger than the window of a stream: where several streams wait for theirs, httpcore 1.0 forgets all but the
    // one that reads the update, whatever the server does.
    let bodies: Vec<String> = (0..100)
        .map(|index| {
            let events: Vec<String> = (0..=index % 10 * 10)
                .map(|number| event::small_event(SEED, 100 * index + number))
                .collect();
            format!("{{\"events\":[{}]}}", events.join(","))
        })
        .collect();
    for (weir, scheme) in [
        (start(""), "http"),
        (
            tls::start(&Authority::new(), "", "http2 = true\n", ""),
            "https",
        ),
    ] {
        let mut config = json!({ "url": format!("{scheme}://{}/x", weir.address), "http2": true });
        if scheme == "https" {
            config["ca"] = json!(weir.directory.path().join("ca.pem"));
        }
        assert_eq!(httpx(config, &bodies), all_posted(100, "HTTP/2"));
        assert_accounts(weir, 100, compacted(bodies.iter().map(String::as_str)));
    }
}
