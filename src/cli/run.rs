//! `weir run`: a node until a signal.

use std::io::Write;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::Config;
use crate::error::Fatal;
use crate::node::Node;

/// How often the main thread looks whether a reactor has ended by itself.
const REACTOR_CHECK: Duration = Duration::from_millis(250);

/// SIGTERM and SIGINT, caught from the moment this exists.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn catch(node: &Node) -> Result<Signals, Fatal> {
        let _runtime = node.runtime().enter();
        let caught = |kind| {
            signal(kind).map_err(|source| Fatal::Io {
                action: "catching signals".into(),
                source,
            })
        };
        Ok(Signals {
            terminate: caught(SignalKind::terminate())?,
            interrupt: caught(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits for a signal, or for a reactor that ends by itself.
    pub(super) async fn wait(&mut self, node: &Node) -> Result<(), Fatal> {
        let mut check = tokio::time::interval(REACTOR_CHECK);
        loop {
            tokio::select! {
                () = self.next() => return Ok(()),
                _ = check.tick() => if node.reactor_ended() {
                    return Err(Fatal::ReactorPanicked);
                }
            }
        }
    }

    /// From now on a signal ends the process at once.
    pub(super) fn exit_at_next(mut self, node: &Node) {
        node.runtime().spawn(async move {
            self.next().await;
            tracing::warn!("a second signal: leaving without draining");
            std::process::exit(130);
        });
    }
}

/// Starts the node, says where it listens, and drains it at the first signal.
pub fn run(config: Config, floor_receive: bool) -> Result<(), Fatal> {
    let node = Node::start(config, floor_receive)?;
    let mut signals = Signals::catch(&node)?;
    announce(&node);
    node.runtime().block_on(signals.wait(&node))?;
    tracing::info!("draining");
    signals.exit_at_next(&node);
    node.drain()
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
