//! `kill -9` at random moments under load: what was acknowledged is at the destination, bytes equal.
//!
//! The rounds themselves are `weir_perf::kill`; `weir-perf kill` runs hundreds of them on the release binary.

use std::path::Path;

use weir_perf::kill::{Plan, run};

#[test]
fn what_is_acknowledged_survives_ten_kills() {
    let directory = tempfile::tempdir().unwrap();
    let weir = Path::new(env!("CARGO_BIN_EXE_weir"));
    let plan = Plan::new(weir, directory.path(), 10, 20_261_124);
    let report = run(&plan, |_| {}).unwrap_or_else(|error| panic!("{error:#}"));
    if !report.is_clean() {
        panic!("seed {}, in {:?}: {report:#?}", plan.seed, directory.keep());
    }
    // The rounds were what they are meant to be.
    assert_eq!(report.rounds.len(), 10);
    assert!(report.told.acknowledged > 0 && report.told.cut_off > 0);
    assert!(report.rounds_obstructed() > 0 && report.rows_recovered > 0);
}
