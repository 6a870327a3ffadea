//! Replays the committed fuzz corpora in plain `cargo test`: what the fuzzer once found stays found.

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod bodies;

fn replay(target: &str, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(&corpus).expect("a corpus directory") {
        let path = entry.expect("a corpus entry").path();
        println!("{}", path.display());
        body(&std::fs::read(&path).expect("a corpus file"));
        count += 1;
    }
    assert!(count > 0, "an empty corpus proves nothing");
}

#[test]
fn json() {
    replay("json", bodies::json);
}

#[test]
fn http1() {
    replay("http1", bodies::http1);
}

#[test]
fn segment() {
    replay("segment", bodies::segment);
}

#[test]
fn connection() {
    replay("connection", bodies::connection);
}

#[test]
fn http2() {
    replay("http2", bodies::http2);
}

#[test]
fn proxy() {
    replay("proxy", bodies::proxy);
}

#[test]
fn authorization() {
    replay("authorization", bodies::authorization);
}

#[test]
fn config() {
    replay("config", bodies::config);
}
