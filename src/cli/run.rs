//! `weir run`: a node until a signal; SIGHUP reloads its configuration.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::config::Config;
use crate::error::Fatal;
use crate::node::Node;
use crate::reactor::Phase;

/// How often the main thread looks whether a reactor has ended by itself.
const REACTOR_CHECK: Duration = Duration::from_millis(250);

/// SIGTERM and SIGINT, caught from the moment this exists.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// What the shell says of a process that a signal has ended.
const EXIT_CODE_SIGNALLED: i32 = 128;

impl Signals {
    pub(super) fn catch(node: &Node) -> Result<Signals, Fatal> {
        let _runtime = node.runtime().enter();
        Ok(Signals {
            terminate: caught(SignalKind::terminate())?,
            interrupt: caught(SignalKind::interrupt())?,
        })
    }

    /// The next of the two.
    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }

    /// Waits for a signal, or for a reactor that ends by itself.
    pub(super) async fn wait(&mut self, node: &Node) -> Result<(), Fatal> {
        let mut check = tokio::time::interval(REACTOR_CHECK);
        loop {
            tokio::select! {
                _ = self.next() => return Ok(()),
                _ = check.tick() => if node.reactor_ended() {
                    return Err(Fatal::ReactorPanicked);
                }
            }
        }
    }

    /// From now on a signal ends the process at once; it says what it leaves.
    pub(super) fn exit_at_next(mut self, node: &Node) {
        let metrics = node.metrics().clone();
        node.runtime().spawn(async move {
            let signal = self.next().await;
            let left = metrics.left();
            tracing::warn!(
                connections = left.connections,
                rows_in_memory = left.rows_in_memory,
                rows_in_spool = left.rows_in_spool,
                "a second signal: leaving at once; rows in memory alone are lost, and were not acknowledged as more; \
                 rows in the spool are delivered after the next start"
            );
            std::process::exit(EXIT_CODE_SIGNALLED + signal.as_raw_value());
        });
    }
}

/// Starts the node, says where it listens, reloads `file` at SIGHUP, and drains at the first other signal.
pub fn run(config: Config, file: Option<PathBuf>, floor_receive: bool) -> Result<(), Fatal> {
    let node = Node::start(config, floor_receive)?;
    let mut signals = Signals::catch(&node)?;
    if let Some(file) = file {
        node.reloader().read_from(file);
    }
    reload_at_hangup(&node)?;
    announce(&node);
    node.runtime().block_on(signals.wait(&node))?;
    tracing::info!("draining");
    signals.exit_at_next(&node);
    node.drain()
}

/// From now on SIGHUP reloads the configuration, until the node drains.
fn reload_at_hangup(node: &Node) -> Result<(), Fatal> {
    let mut hangup = {
        let _runtime = node.runtime().enter();
        caught(SignalKind::hangup())?
    };
    let reloader = node.reloader().clone();
    let mut phase = node.phase();
    node.runtime().spawn(async move {
        loop {
            tokio::select! {
                // The signal stays caught: from here on it does nothing.
                () = draining(&mut phase) => return,
                // The outcome is in the log, whoever asked.
                _ = hangup.recv() => { let _ = reloader.clone().spawn().await; }
            }
        }
    });
    Ok(())
}

async fn draining(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase > Phase::Running).await;
}

fn caught(kind: SignalKind) -> Result<Signal, Fatal> {
    signal(kind).map_err(|source| Fatal::Io {
        action: "catching signals".into(),
        source,
    })
}

/// One line per listener on standard output: scripts read it.
pub(super) fn announce(node: &Node) {
    let mut stdout = std::io::stdout().lock();
    for address in node.listeners() {
        // Nobody may be reading any more, and that is no reason not to serve.
        let _ = writeln!(stdout, "listening on {address}");
    }
    let _ = stdout.flush();
    tracing::info!(admin = %node.admin(), "ready");
}
