//! `weir demo`: a node with no configuration file that shows what it does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::DemoArgs;
use super::print;
use super::run::{self, Signals};
use crate::admin::resident_bytes;
use crate::config::{Config, Destination, Size};
use crate::error::Fatal;
use crate::metrics::{Count, Snapshot};
use crate::node::{Node, NodeMetrics};

/// Runs until SIGINT or SIGTERM, showing each second what came in and what was written.
pub(super) fn run(args: &DemoArgs) -> Result<(), Fatal> {
    let mut config = Config::default();
    config.listeners[0].address = args.listen;
    config.admin.address = args.admin;
    config.destination = Destination::Directory {
        path: args.out.clone(),
    };
    config.batch.max_age = BATCH_AGE_MAX;
    let table = &config.tables[0];
    let blobs = args.out.join(&table.database).join(&table.table);
    let blobs = blobs.display();
    let node = Node::start(config, false)?;
    let mut signals = Signals::catch(&node)?;
    run::announce(&node);
    let address = node.listeners()[0];
    print(&format!(
        "metrics on http://{}/metrics\n\
         blobs, sealed after a second, in {blobs}/\n\n\
         Try, in another terminal:\n\n  \
         curl --json '{{\"hello\": \"weir\"}}' http://{address}/demo\n\n\
         Ctrl-C drains and ends.\n\n",
        node.admin()
    ))?;
    let signalled = node.runtime().block_on(async {
        tokio::select! {
            ended = signals.wait(&node) => ended,
            shown = show(node.metrics()) => shown,
        }
    });
    signalled?;
    signals.exit_at_next(&node);
    print("\ndraining\n")?;
    let metrics = node.metrics().clone();
    node.drain()?;
    let blob_count = metrics.uplink.blobs.load(Ordering::Relaxed);
    let record_count = metrics.snapshot().value(Count::Records);
    if blob_count == 0 {
        print("nothing was sent, so nothing was written\n")
    } else {
        print(&format!(
            "{record_count} records in {blob_count} blobs in {blobs}/; read them with\n\n  \
             gunzip -c {blobs}/*.json.gz | tail -n 3\n"
        ))
    }
}

/// Sooner than the default, so that the first blob is there while one looks.
const BATCH_AGE_MAX: Duration = Duration::from_secs(1);

/// A size to be read, not pasted.
fn read(size: u64) -> String {
    format!("{:.2}", Size(size))
}

/// A line per second; ends only where it cannot be written.
async fn show(metrics: &NodeMetrics) -> Result<(), Fatal> {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let mut before = (metrics.snapshot(), 0);
    loop {
        second.tick().await;
        let blobs = metrics.uplink.blobs.load(Ordering::Relaxed);
        let now = (metrics.snapshot(), blobs);
        print(&difference(&before, &now))?;
        before = now;
    }
}

fn difference(before: &(Snapshot, u64), now: &(Snapshot, u64)) -> String {
    let more = |count| now.0.value(count) - before.0.value(count);
    let failed = more(Count::Rejected) + more(Count::Refused) + more(Count::Aborted);
    format!(
        "in: {} requests ({failed} not accepted), {} records, {} | out: {} of rows, {} blobs | resident {}\n",
        more(Count::Received),
        more(Count::Records),
        read(more(Count::BytesReceived)),
        read(more(Count::RowBytes)),
        now.1 - before.1,
        read(resident_bytes()),
    )
}
