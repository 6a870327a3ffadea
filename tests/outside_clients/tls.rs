//! Over TLS, HTTP/1.1: what the clients agree on, whom they believe, and whom weir does.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::programs::{Load, curl, h2load, httpx};
use super::support::tls::{Authority, Pair, Tunnel};
use super::support::{Weir, base_config, free_address};
use super::{
    DEADLINES, SEED, all_posted, assert_accounts, compacted, file,
    good_requests_are_answered_during, hundred_events,
};
use weir_perf::event;

const FILES: &str = "certificate = \"tls.crt\", key = \"tls.key\"";

/// A weir that speaks TLS, with `tls` behind the files in the listener's table, `listener` behind the table, and `more`
/// at the end.
pub fn start(authority: &Authority, tls: &str, listener: &str, more: &str) -> Weir {
    let directory = tempfile::tempdir().unwrap();
    authority.server(1).write(directory.path());
    std::fs::write(directory.path().join("ca.pem"), &authority.pem).unwrap();
    let admin = free_address();
    let config = base_config(admin).replace(
        "[admin]",
        &format!("tls = {{ {FILES}{tls} }}\n{listener}[admin]"),
    );
    Weir::start_in(directory, &format!("{config}{more}"), admin)
}

fn path(weir: &Weir, name: &str) -> String {
    weir.directory.path().join(name).display().to_string()
}

#[test]
#[ignore = "needs curl (apt-get install curl)"]
fn curl_agrees_on_a_version_and_a_protocol() {
    let authority = Authority::new();
    let weir = start(&authority, "", "", "");
    let (url, ca) = (format!("https://{}/x", weir.address), path(&weir, "ca.pem"));
    let (small, large) = (event::small_event(SEED, 1), event::large_event(SEED, 2));
    let mut acknowledged = Vec::new();
    for (arguments, body, is_continued) in [
        // It offers h2 and http/1.1.
        (vec!["--json", "@-"], &small, false),
        (vec!["--http1.1", "--json", "@-"], &large, false),
        (vec!["--no-alpn", "--json", "@-"], &large, false),
        (vec!["--tls-max", "1.2", "--json", "@-"], &large, false),
        (vec!["--tlsv1.3", "--json", "@-"], &large, false),
        (
            vec!["--request", "POST", "--upload-file", "-"],
            &large,
            true,
        ),
        (
            vec!["--header", "Expect: 100-continue", "--json", "@-"],
            &large,
            true,
        ),
    ] {
        let run = curl(
            &[&arguments[..], &["--cacert", &ca, &url]].concat(),
            body.as_bytes(),
        );
        assert_eq!(
            (run.code, run.statuses()),
            (0, vec![201]),
            "{arguments:?}: {run:?}"
        );
        assert_eq!(run.transfers[0].version, "1.1");
        assert_eq!(run.was_continued(), is_continued, "{arguments:?}: {run:?}");
        acknowledged.push(body.as_str());
    }
    // Who does not know the authority sends nothing (CURLE_PEER_FAILED_VERIFICATION).
    assert_eq!(curl(&["--json", "{}", &url], b"").code, 60);
    // One handshake for all.
    let run = curl(&["--cacert", &ca, "--json", &small, &url, &url, &url], b"");
    let connects: Vec<u32> = run
        .transfers
        .iter()
        .map(|transfer| transfer.connects)
        .collect();
    assert_eq!(
        (run.statuses(), connects),
        (vec![201; 3], vec![1, 0, 0]),
        "{run:?}"
    );
    acknowledged.extend([small.as_str(); 3]);
    assert_accounts(weir, acknowledged.len() as u64, compacted(acknowledged));
}

fn write(pair: &Pair, directory: &Path, name: &str) -> [PathBuf; 2] {
    let directory = directory.join(name);
    std::fs::create_dir(&directory).unwrap();
    pair.write(&directory);
    ["tls.crt", "tls.key"].map(|file| directory.join(file))
}

#[test]
#[ignore = "needs curl (apt-get install curl), and httpx: set WEIR_TEST_PYTHON to what tests/python/venv.sh DIRECTORY prints"]
fn curl_and_httpx_show_their_certificates() {
    let authority = Authority::new();
    let clients = tempfile::tempdir().unwrap();
    let [good, other, revoked, stranger] = [
        ("good", authority.client("device-1", 11)),
        ("other", authority.client("device-2", 12)),
        ("revoked", authority.client("device-1", 13)),
        ("stranger", Authority::new().client("device-1", 14)),
    ]
    .map(|(name, pair)| write(&pair, clients.path(), name));
    let list = clients.path().join("crl.pem");
    std::fs::write(&list, authority.revoke(&[13])).unwrap();
    let weir = start(
        &authority,
        &format!(", client_ca = \"ca.pem\", client_crl = {list:?}"),
        "principals = [\"device\"]\n",
        "[[principal]]\nname = \"device\"\ncertificate = { subjects = [\"CN=device-1,O=Example\"] }\n",
    );
    let (url, ca) = (format!("https://{}/x", weir.address), path(&weir, "ca.pem"));
    let body = event::large_event(SEED, 3);
    let post = |files: Option<&[PathBuf; 2]>| {
        let mut arguments = vec!["--cacert", &ca, "--json", "@-", &url];
        if let Some([certificate, key]) = files {
            arguments.extend(["--cert", certificate.to_str().unwrap()]);
            arguments.extend(["--key", key.to_str().unwrap()]);
        }
        curl(&arguments, body.as_bytes())
    };
    let run = post(Some(&good));
    assert_eq!((run.code, run.statuses()), (0, vec![201]), "{run:?}");
    // The authority knows it, the listener does not take it.
    let run = post(Some(&other));
    assert_eq!((run.code, run.statuses()), (0, vec![403]), "{run:?}");
    for refused in [None, Some(&revoked), Some(&stranger)] {
        let run = post(refused);
        assert_ne!(run.code, 0, "{refused:?}: {run:?}");
        assert_eq!(run.statuses(), [0], "{refused:?}: {run:?}");
        assert!(run.trace.contains("alert"), "{refused:?}: {run:?}");
    }
    let [certificate, key] = &good;
    let config = json!({
        "url": url, "http2": false, "ca": ca, "certificate": certificate, "key": key,
    });
    let bodies = hundred_events();
    assert_eq!(httpx(config, &bodies), all_posted(100, "HTTP/1.1"));
    let acknowledged = bodies.iter().chain([&body]).map(String::as_str);
    assert_accounts(weir, 101, compacted(acknowledged));
}

#[test]
#[ignore = "needs h2load (apt-get install nghttp2-client)"]
fn h2load_posts_over_tls() {
    let weir = start(&Authority::new(), "", "", "");
    let url = format!("https://{}/x", weir.address);
    let mut acknowledged = Vec::new();
    for (name, body, count, connections) in [
        ("small", event::small_event(SEED, 4), "1000", "50"),
        ("large", event::large_event(SEED, 5), "100", "10"),
    ] {
        let path = file(&weir, name, &body);
        let load = h2load(&["--h1", "-n", count, "-c", connections, &url], &path);
        let count: u64 = count.parse().unwrap();
        assert_eq!(load, Load::all_accepted(count));
        acknowledged.extend(std::iter::repeat_n(event::compact(&body), count as usize));
    }
    acknowledged.sort_unstable();
    assert_accounts(weir, 1_100, acknowledged);
}

#[test]
#[ignore = "needs slowhttptest (apt-get install slowhttptest)"]
fn slow_heads_over_tls_do_not_stop_good_requests() {
    let authority = Authority::new();
    let weir = start(&authority, "", "", DEADLINES);
    // The good ones speak through it.
    let tunnel = Tunnel::open(weir.address, authority.config(None), 16 << 10);
    let url = format!("https://{}/x", weir.address);
    good_requests_are_answered_during(&["-H", "-i", "1"], weir, &url, tunnel.address);
}
