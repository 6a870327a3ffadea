//! How weir ends: what it still delivers, and what a second signal leaves.
//!
//! Requests in flight over a signal are in `tests/ingest.rs`.

mod support;

use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use support::{PATIENCE, Weir, base_config, free_address, records};

fn signal(weir: &Weir, signal: Signal) {
    let pid = Pid::from_raw(weir.pid() as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
    }
}

#[test]
fn a_second_signal_ends_it_at_once_and_says_what_is_left() {
    for (second, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let admin = free_address();
        let directory = tempfile::tempdir().unwrap();
        let mut weir = Weir::start_logging(directory, &base_config(admin), admin, "info");
        weir.block_delivery("Events", true);
        assert_eq!(weir.connect().post("/x", b"{\"a\":1}").status, 201);
        let mut busy = weir.connect();
        busy.send(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\n\r\n{\"a\"");
        weir.wait_for_metric("weir_slabs{size=\"16384\",state=\"in_kernel\"} 1");
        weir.wait_for_metric("weir_connections 1");
        signal(&weir, Signal::TERM);
        // The request holds the drain up, and the admin address answers all the while.
        wait_until("it never drains", || {
            weir.admin_get("/readyz") == (503, "draining\n".into())
        });
        assert_eq!(weir.admin_get("/livez").0, 200);
        assert_eq!(weir.metric("weir_connections"), 1);
        // A reload is too late.
        signal(&weir, Signal::HUP);
        signal(&weir, second);
        assert_eq!(weir.wait(), Some(code));
        let log = weir.log();
        let said = "a second signal: leaving at once";
        let line = log.lines().find(|line| line.contains(said));
        let line = line.unwrap_or_else(|| panic!("{log}"));
        assert!(
            line.ends_with("connections=1 rows_in_memory=0 rows_in_spool=1"),
            "{line}"
        );
        assert!(!log.contains("reloaded"), "{log}");
        // What was acknowledged is there after the next start.
        let directory = weir.kill();
        support::block_delivery(directory.path(), "Events", false);
        let weir = Weir::start_in(directory, &base_config(admin), admin);
        weir.wait_for_metric("weir_delivered_rows_total 1");
        assert_eq!(
            records(&weir.stop().rows("Telemetry", "Events")),
            ["{\"a\":1}"]
        );
    }
}

#[test]
fn a_drain_delivers_also_what_only_the_spool_has() {
    let tables = ["T0", "T1", "T2", "T3"];
    let routes: String = tables
        .iter()
        .map(|table| format!("[[route]]\npath = \"/{table}\"\ntable = \"{table}\"\n"))
        .collect();
    let weir = Weir::start(&routes);
    for table in tables {
        weir.block_delivery(table, true);
        let path = format!("/{table}");
        assert_eq!(weir.connect().post(&path, b"{\"a\":1}").status, 201);
    }
    // Each has failed once, and has given its memory up.
    weir.wait_for_metric("weir_spool_backlog_batches 4");
    for table in tables {
        weir.block_delivery(table, false);
    }
    // Delivery rests after its failures, for seconds in the end; the drain ends that.
    let stopped = weir.stop();
    for table in tables {
        assert_eq!(records(&stopped.rows("Telemetry", table)), ["{\"a\":1}"]);
    }
    let said = "undelivered batches stay in the spool";
    assert!(!stopped.stderr.contains(said), "{}", stopped.stderr);
}
