//! `weir standin`: the stand-in for Azure Data Explorer as a process of its own, for measurements.
//!
//! It keeps few rows and parses one in many, so that it costs little beside the node that is measured.

use std::fs;

use super::{StandinArgs, print};
use crate::error::Fatal;
use crate::standin::{RowCheck, Standin, StandinOptions};

/// Of the rows, one in this many is parsed.
const ROW_CHECK: u64 = 100;
/// Bytes of blobs that it keeps while it ingests nothing: two minutes of large rows at 200 MB/s, compressed.
const HELD_SIZE_MAX: usize = 4 << 30;

/// Writes the `[destination]` of a node that delivers to it into `destination.toml` of the directory; runs until SIGTERM.
pub(super) fn run(args: &StandinArgs) -> Result<(), Fatal> {
    let fault = |action: &str| {
        let action = action.to_owned();
        move |source| Fatal::Io { action, source }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(fault("starting the runtime"))?;
    let mut options = StandinOptions {
        listen: args.listen,
        rows_size_max: 1 << 20,
        row_check: RowCheck::OneIn(ROW_CHECK),
        ..StandinOptions::default()
    };
    if args.hold {
        options.blobs_size_max = HELD_SIZE_MAX;
    }
    let standin =
        Standin::start(options, runtime.handle()).map_err(fault("starting the stand-in"))?;
    if args.hold {
        standin.pause_ingestion();
    }
    let options = standin.options();
    // The node has a directory of its own.
    let directory = fs::canonicalize(&args.directory).map_err(fault("finding the directory"))?;
    let secret = directory.join("standin-secret");
    let destination = format!(
        "[destination]\ntype = \"kusto\"\ningest_uri = \"{}\"\n[destination.identity.client_secret]\ntenant = \"{}\"\n\
         client_id = \"{}\"\nsecret = {{ file = {:?} }}\n",
        standin.ingest_uri(),
        options.tenant,
        options.client_id,
        secret.display().to_string(),
    );
    fs::write(&secret, &options.client_secret)
        .and_then(|()| fs::write(directory.join("destination.toml"), destination))
        .map_err(fault("writing the destination"))?;
    let address = standin.ingest_uri();
    print(&format!(
        "listening on {}\n",
        address.trim_start_matches("http://")
    ))?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).map_err(fault("catching signals"))?;
        let mut resume = signal(SignalKind::user_defined1()).map_err(fault("catching signals"))?;
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = resume.recv() => standin.resume_ingestion(),
            }
        }
    })
}
