//! weir as a process delivers to the stand-in: what was acknowledged lands, whatever goes wrong on the way.

mod support;
#[path = "support/standin.rs"]
mod remote;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use remote::{Bench, DATABASE};
use serde_json::Value;
use support::{Stopped, Weir, free_address};
use weir::standin::{Action, Fault, StandinOptions, Target};

/// A weir whose destination is the stand-in of `bench`.
fn config(bench: &Bench, admin: SocketAddr, more: &str) -> String {
    let options = bench.standin.options();
    std::fs::create_dir_all("/nonexistent").ok();
    format!(
        "[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"{admin}\"\n\
         [destination]\ntype = \"kusto\"\ningest_uri = \"{}\"\n\
         identity = {{ client_secret = {{ tenant = \"{}\", client_id = \"{}\", secret = {{ file = \"secret\" }} }} }}\n\
         [spool]\ndirectory = \"spool\"\nsize = \"64MiB\"\n\
         [dead_letter]\ndirectory = \"dead-letter\"\nsize = \"8MiB\"\n\
         [batch]\nmax_age = \"100ms\"\n{more}",
        bench.standin.ingest_uri(),
        options.tenant,
        options.client_id,
    )
}
