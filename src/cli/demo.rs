//! `weir demo`: a node with no configuration file that shows what it does, and what it delivers to.
//!
//! The destination is a stand-in for Azure Data Explorer in this process, on loopback, so the whole way of a row is
//! there: token, resources, blob, message, ingestion. With `--out` it is a directory.
//! With `--tls` it listens under a certificate of its own (`demo/certificate.rs`).

mod certificate;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Runtime;

use super::DemoArgs;
use super::print;
use super::run::{self, Signals};
use certificate::Certificate;

use crate::admin::resident_bytes;
use crate::config::{Config, Destination, Identity, KustoConfig, Mode, Size, Table};
use crate::error::Fatal;
use crate::metrics::{Count, Snapshot};
use crate::node::{Node, NodeMetrics};
use crate::secret::SecretSource;
use crate::standin::{Standin, StandinOptions};

/// Runs until SIGINT or SIGTERM, showing each second what came in and what was delivered.
pub(super) fn run(args: &DemoArgs) -> Result<(), Fatal> {
    let mut config = Config::default();
    config.listeners[0].address = args.listen;
    config.admin.address = args.admin;
    config.batch.max_age = BATCH_AGE_MAX;
    let table = config.tables[0].clone();
    let remote = match &args.out {
        Some(out) => Remote::Directory(out.clone()),
        None => Remote::start(args, &config)?,
    };
    config.destination = remote.destination()?;
    let certificate = match args.tls {
        true => Some(Certificate::make(&directory(&config), args.listen.ip())?),
        false => None,
    };
    config.listeners[0].tls = certificate.as_ref().map(Certificate::listener);
    // Over TLS the client says which it wants.
    config.listeners[0].http2 = args.tls;
    let node = Node::start(config, false)?;
    let mut signals = Signals::catch(&node)?;
    run::announce(&node);
    let address = node.listeners()[0];
    let curl = match &certificate {
        Some(certificate) => format!(
            "curl {} --json '{{\"hello\": \"weir\"}}' https",
            certificate.argument()
        ),
        None => "curl --json '{\"hello\": \"weir\"}' http".into(),
    };
    print(&format!(
        "metrics on http://{}/metrics\n{}\n\n\
         Try, in another terminal:\n\n  \
         {curl}://{address}/demo\n\n\
         Ctrl-C drains and ends.\n\n",
        node.admin(),
        remote.announcement(&table),
    ))?;
    let signalled = node.runtime().block_on(async {
        tokio::select! {
            ended = signals.wait(&node) => ended,
            shown = show(node.metrics(), &remote, &table) => shown,
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
        return print("nothing was sent, so nothing was delivered\n");
    }
    print(&format!("{record_count} records in {blob_count} blobs"))?;
    print(&remote.farewell(&table))
}

/// Sooner than the default, so that the first blob is there while one looks.
const BATCH_AGE_MAX: Duration = Duration::from_secs(1);

/// Rows that are shown of those that landed in a second.
const ROWS_SHOWN_MAX: u64 = 3;

/// How much of a row is shown, in characters.
const ROW_SHOWN_SIZE: usize = 160;

/// How long the stand-in may take for what was delivered last.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// Where the demo's rows go.
enum Remote {
    Directory(PathBuf),
    Standin {
        standin: Box<Standin>,
        /// The file with the stand-in's client secret, which is no secret.
        secret: PathBuf,
        // Last, so that it outlives what runs on it.
        _runtime: Runtime,
    },
}

impl Remote {
    fn start(args: &DemoArgs, config: &Config) -> Result<Remote, Fatal> {
        let fault = |action: &str| {
            let action = action.to_owned();
            move |source| Fatal::Io { action, source }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("standin")
            .enable_all()
            .build()
            .map_err(fault("starting the stand-in's runtime"))?;
        let options = StandinOptions {
            listen: args.standin,
            ..StandinOptions::default()
        };
        // A configuration names secrets and never holds one, also here.
        let directory = directory(config);
        let secret = directory.join("standin-secret");
        std::fs::create_dir_all(&directory)
            .and_then(|()| std::fs::write(&secret, &options.client_secret))
            .map_err(fault("writing the stand-in's client secret"))?;
        let standin =
            Standin::start(options, runtime.handle()).map_err(|source| match source.kind() {
                std::io::ErrorKind::AddrInUse => Fatal::binding(args.standin, source),
                _ => Fatal::Io {
                    action: "starting the stand-in".into(),
                    source,
                },
            })?;
        Ok(Remote::Standin {
            standin: Box::new(standin),
            secret,
            _runtime: runtime,
        })
    }

    fn destination(&self) -> Result<Destination, Fatal> {
        Ok(match self {
            Remote::Directory(path) => Destination::Directory { path: path.clone() },
            Remote::Standin {
                standin, secret, ..
            } => {
                let options = standin.options();
                Destination::Kusto(KustoConfig {
                    ingest_uri: standin
                        .ingest_uri()
                        .parse()
                        .expect("the stand-in has a valid URI"),
                    identity: Identity::ClientSecret {
                        tenant: options.tenant.clone(),
                        client_id: options.client_id.clone(),
                        secret: SecretSource::File(secret.clone()),
                    },
                    mode: Mode::Queued,
                    trusted_hosts: Vec::new(),
                })
            }
        })
    }

    fn announcement(&self, table: &Table) -> String {
        let Table {
            database, table, ..
        } = table;
        match self {
            Remote::Directory(path) => {
                let blobs = path.join(database).join(table);
                format!("blobs, sealed after a second, in {}/", blobs.display())
            }
            Remote::Standin { standin, .. } => format!(
                "a stand-in for Azure Data Explorer, with the table {database}.{table}; its rows:\n\n  \
                 curl '{}/rows?database={database}&table={table}&n=3'",
                standin.ingest_uri()
            ),
        }
    }

    /// Rows that landed since there were `before`, and how many there are now.
    fn landed(&self, table: &Table, before: u64) -> (u64, String) {
        let Remote::Standin { standin, .. } = self else {
            return (0, String::new());
        };
        let count = standin.row_count(&table.database, &table.table);
        let more = count - before;
        let shown = more.min(ROWS_SHOWN_MAX) as usize;
        let mut text = String::new();
        for row in standin.newest_rows(&table.database, &table.table, shown) {
            let cut: String = row.chars().take(ROW_SHOWN_SIZE).collect();
            let dots = if cut.len() < row.len() { "…" } else { "" };
            text.push_str(&format!("landed: {cut}{dots}\n"));
        }
        if more > ROWS_SHOWN_MAX {
            text.push_str(&format!("        {more} rows in this second\n"));
        }
        (count, text)
    }

    fn farewell(&self, table: &Table) -> String {
        match self {
            Remote::Directory(path) => {
                let blobs = path.join(&table.database).join(&table.table);
                let blobs = blobs.display();
                format!(
                    " in {blobs}/; read them with\n\n  gunzip -c {blobs}/*.json.gz | tail -n 3\n"
                )
            }
            Remote::Standin { standin, .. } => {
                standin.wait_settled(SETTLE_TIME);
                format!(
                    "; {} rows landed in {}.{} of the stand-in, which ends with this demo\n",
                    standin.row_count(&table.database, &table.table),
                    table.database,
                    table.table
                )
            }
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Remote::Standin { secret, .. } = self {
            // It says nothing to anybody, and is written again.
            let _ = std::fs::remove_file(secret);
        }
    }
}

/// Where the demo keeps what it needs while it runs.
fn directory(config: &Config) -> PathBuf {
    let directory = config.dead_letter.directory.parent();
    directory.unwrap_or(Path::new(".")).to_owned()
}

/// A size to be read, not pasted.
fn read(size: u64) -> String {
    format!("{:.2}", Size(size))
}

/// A line per second, and the rows that landed; ends only where it cannot be written.
async fn show(metrics: &NodeMetrics, remote: &Remote, table: &Table) -> Result<(), Fatal> {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let mut before = (metrics.snapshot(), 0);
    let mut landed = 0;
    loop {
        second.tick().await;
        let blobs = metrics.uplink.blobs.load(Ordering::Relaxed);
        let now = (metrics.snapshot(), blobs);
        print(&difference(&before, &now))?;
        before = now;
        let (count, rows) = remote.landed(table, landed);
        print(&rows)?;
        landed = count;
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
