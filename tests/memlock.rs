//! An ordinary user's memlock limit is too small for the slabs: weir starts all the same, and says so once.
//!
//! Alone in its file, because the limit is the whole process's.

mod support;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use support::{Weir, base_config, free_address, run_to_its_end};

#[test]
fn slabs_that_cannot_be_registered_are_used_unregistered_unless_required() {
    // What this thread starts from here on is an ordinary user's in this respect.
    // An ordinary user has no capability to drop, and may not try: both are fine.
    let _ = remove_capability_from_bounding_set(CapabilitySet::IPC_LOCK);
    let before = getrlimit(Resource::Memlock);
    let lowered = Rlimit {
        current: Some(8 << 20),
        maximum: before.maximum,
    };
    setrlimit(Resource::Memlock, lowered).unwrap();

    let weir = Weir::start("");
    assert_eq!(weir.metric("weir_slabs_registered_cores"), 0);
    let mut client = weir.connect();
    for _ in 0..100 {
        assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    }
    let stopped = weir.stop();
    assert_eq!(
        stopped.stderr.matches("unregistered").count(),
        1,
        "{}",
        stopped.stderr
    );
    assert_eq!(stopped.rows("Telemetry", "Events").len(), 100);

    let directory = tempfile::tempdir().unwrap();
    let required = format!(
        "{}[slabs]\nregistered = \"require\"\n",
        base_config(free_address())
    );
    let (code, stderr) = run_to_its_end(directory.path(), &required);
    assert!(code.is_some_and(|code| code != 0));
    assert!(
        stderr.lines().last().unwrap().contains("memlock"),
        "{stderr}"
    );

    setrlimit(Resource::Memlock, before).unwrap();
}
