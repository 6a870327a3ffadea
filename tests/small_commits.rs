//! Many small commits: they use up a segment's room for heads before its batch is full, and the batch is sealed early.

mod support;

use support::{Weir, base_config, free_address, records};

/// Rows that come while a commit is on its way go into the next one, which has a head of its own: room for both heads
/// must be left, or the last commit of a segment does not fit it.
#[test]
fn a_segment_is_filled_by_small_commits_while_rows_keep_coming() {
    const SENDERS: usize = 8;
    const REQUESTS: usize = 400;
    let admin = free_address();
    // Age seals nothing here: only a segment that is full does.
    let config = base_config(admin).replace("200ms", "1h")
        + "[upload]\nbuffer_count = 3\nbuffer_size = \"128KiB\"\n\
           [limits]\nrecord = \"64KiB\"\ndrain = \"1s\"\n";
    let weir = Weir::start_with(&config, admin);
    let answered = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let mut client = weir.connect();
                scope.spawn(move || {
                    for request in 0..REQUESTS {
                        let body = format!("{{\"s\":{sender},\"r\":{request}}}");
                        let reply = client.post("/x", body.as_bytes());
                        assert_eq!(reply.status, 201, "{reply:?}");
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = senders.into_iter().map(|sender| sender.join()).collect();
        outcomes.iter().all(Result::is_ok)
    });
    if !answered {
        let (code, log) = weir.terminate();
        panic!("weir ended with {code:?} and said:\n{log}");
    }
    assert!(
        weir.metric("weir_batches_sealed_total") > 0,
        "no segment was filled"
    );
    // What a drain leaves in the spool is delivered after the next start.
    let stopped = weir.stop();
    let weir = Weir::start_in(stopped.directory, &config, admin);
    let count = weir.metric("weir_spool_segments");
    weir.wait_for_metric(&format!("weir_spool_segments_free {count}"));
    let mut stored = records(&weir.stop().rows("Telemetry", "Events"));
    stored.sort();
    stored.dedup();
    assert_eq!(stored.len(), SENDERS * REQUESTS);
}
