//! A node: the reactors, the uplink and the admin server, from start to drain.
//!
//! Before it: [`crate::cli`] has a valid configuration.
//! After it: [`crate::reactor`] and [`crate::uplink`] do the work until [`Node::drain`].
//! Thread: the caller's. Allocates: freely, at start.
//! Invariant: a node that started accepts on every listener; one that could not start has said why, and left nothing
//! running.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::sched_getaffinity;
use tokio::sync::watch;

use crate::accept;
use crate::admin::Admin;
use crate::admission::Admission;
use crate::budget::Budget;
use crate::budget::machine::Machine;
use crate::config::{Config, Table};
use crate::error::Fatal;
use crate::limits::FRAME_BUFFER_SIZE;
use crate::memory::Region;
use crate::metrics::{CoreMetrics, Snapshot};
use crate::reactor::{Phase, Reactor, Ready, Remainder};
use crate::spool::disk::Disk;
use crate::spool::recover::{PendingSegment, pending_batches};
use crate::spool::{self, Opened, Segments, Spool, SpoolMetrics};
use crate::tls::Tls;
use crate::uplink::dead_letter::DeadLetters;
use crate::uplink::kusto::Kusto;
use crate::uplink::settlement::Settlement;
use crate::uplink::{self, Handover, Sink, Uplink, UplinkMetrics};

/// A running node.
pub struct Node {
    config: Arc<Config>,
    listeners: Vec<SocketAddr>,
    admin: SocketAddr,
    reactors: Vec<JoinHandle<Remainder>>,
    /// One message when a reactor ends, in whatever way.
    ended: mpsc::Receiver<()>,
    phase: watch::Sender<Phase>,
    runtime: tokio::runtime::Runtime,
    metrics: Arc<NodeMetrics>,
}

/// The metrics of all parts.
pub struct NodeMetrics {
    pub cores: Vec<Arc<CoreMetrics>>,
    pub uplink: Arc<UplinkMetrics>,
    pub spool: Option<SpoolView>,
    /// Set where the destination is Kusto.
    pub kusto: OnceLock<KustoView>,
    pub tls: Arc<Tls>,
}

/// What there is to see of Kusto.
pub struct KustoView {
    pub kusto: Arc<Kusto>,
    pub dead_letters: Arc<DeadLetters>,
}

/// What there is to see of the spool.
pub struct SpoolView {
    pub segments: Arc<Segments>,
    pub metrics: Arc<SpoolMetrics>,
}

impl NodeMetrics {
    /// The sum over all cores.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot::zero();
        for core in &self.cores {
            sum.merge(&core.snapshot());
        }
        sum
    }
}

/// Sends its message when it is dropped: also when the thread panics.
struct EndSignal(mpsc::Sender<()>);

impl Drop for EndSignal {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

impl Node {
    /// Starts a node. `floor_receive` is for measurements only: see [`Reactor::floor_receive`].
    pub fn start(config: Config, floor_receive: bool) -> Result<Node, Fatal> {
        Budget::new(&config).verify(&config, &Machine::read())?;
        let disk = spool::take(&config)?;
        Self::start_on(config, floor_receive, disk)
    }

    /// Starts a node whose spool is on `disk`; none where no table is spooled.
    pub fn start_on<D: Disk>(
        config: Config,
        floor_receive: bool,
        disk: Option<D>,
    ) -> Result<Node, Fatal> {
        let admission = Arc::new(Admission::load(&config)?);
        let tls = Arc::new(Tls::load(&config)?);
        raise_descriptor_limit();
        let core_count = config.cores;
        let config = Arc::new(config);

        let mut sockets: Vec<Vec<std::net::TcpListener>> =
            (0..core_count).map(|_| Vec::new()).collect();
        let mut listeners = Vec::new();
        for listener in &config.listeners {
            let bound = accept::bind(listener.address, core_count)?;
            listeners.push(bound[0].local_addr().map_err(|source| Fatal::Bind {
                address: listener.address,
                source,
            })?);
            for (core_sockets, socket) in sockets.iter_mut().zip(bound) {
                core_sockets.push(socket);
            }
        }

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            // A delivery per core or per blob on its way to Kusto, one that opens segments, and one that recovers them;
            // and a segment may still be read for an attempt that has just failed.
            .max_blocking_threads(core_count.max(2 * config.uplink.concurrency) + 2)
            .thread_name("weir-uplink")
            .enable_all()
            .build()
            .map_err(|source| Fatal::Io {
                action: "starting the uplink runtime".into(),
                source,
            })?;
        let run = uuid::Uuid::now_v7();
        let (spool, pending, tables) = match disk {
            Some(disk) => {
                let Opened {
                    spool,
                    pending,
                    tables,
                } = Spool::open(disk, &config, run)?;
                (Some(spool), pending, tables)
            }
            None => (None, Vec::new(), config.tables.clone()),
        };
        let segments = spool.as_ref().map(|spool| spool.segments().clone());
        let metrics = Arc::new(NodeMetrics {
            cores: (0..core_count)
                .map(|_| Arc::new(CoreMetrics::new()))
                .collect(),
            uplink: Arc::new(UplinkMetrics::default()),
            spool: spool.as_ref().map(|spool| SpoolView {
                segments: spool.segments().clone(),
                metrics: spool.metrics().clone(),
            }),
            kusto: OnceLock::new(),
            tls: tls.clone(),
        });
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let admin = Admin::bind(config.admin.address)?;
        let admin_address = admin.address();

        let cpus = cpus_allowed();
        let (ready_sender, ready_receiver) = mpsc::channel();
        let (end_sender, ended) = mpsc::channel();
        let mut reactors = Vec::with_capacity(core_count);
        let handover = || {
            let reported_max = config.reported_max();
            let buffer_count = config.upload.buffer_count;
            Arc::new(Handover::new(buffer_count, reported_max, segments.clone()))
        };
        let handovers: Arc<Vec<_>> = Arc::new((0..core_count).map(|_| handover()).collect());
        let settlement = Arc::new(Settlement {
            handovers: handovers.clone(),
            spool: spool.clone(),
            metrics: metrics.uplink.clone(),
        });
        // A node that has something to deliver starts, also where the destination is away.
        let may_be_away = !pending.is_empty();
        let sink = Sink::open(
            &config,
            &tables,
            may_be_away,
            &settlement,
            &phase_seen,
            runtime.handle(),
        )?;
        if let Sink::Kusto(courier) = &sink {
            let view = KustoView {
                kusto: courier.kusto.clone(),
                dead_letters: courier.dead_letters.clone(),
            };
            let set = metrics.kusto.set(view);
            assert!(set.is_ok(), "set once");
        }
        let window = || {
            Region::map(FRAME_BUFFER_SIZE).map_err(|source| Fatal::Io {
                action: "mapping a window on the spool".into(),
                source,
            })
        };
        for (index, listeners) in sockets.into_iter().enumerate() {
            let window = match &sink {
                Sink::Directory(_) => Some(window()?),
                Sink::Null | Sink::Kusto(_) => None,
            };
            runtime.spawn(
                Uplink {
                    core_index: index,
                    settlement: settlement.clone(),
                    window,
                    sink: sink.clone(),
                    phase: phase_seen.clone(),
                }
                .run(),
            );
            let reactor = Reactor {
                run,
                index,
                cpu: (core_count <= cpus.len()).then(|| cpus[index]),
                config: config.clone(),
                admission: admission.clone(),
                tls: tls.clone(),
                listeners,
                handover: handovers[index].clone(),
                spool: spool
                    .as_ref()
                    .map(|spool| (spool.segments().clone(), spool.disk().clone())),
                metrics: metrics.cores[index].clone(),
                phase: phase_seen.clone(),
                floor_receive,
            };
            let ready_sender = ready_sender.clone();
            let end_signal = EndSignal(end_sender.clone());
            let thread = thread::Builder::new()
                .name(format!("weir-core-{index}"))
                .spawn(move || {
                    let _end_signal = end_signal;
                    reactor.run(|ready| {
                        let _ = ready_sender.send(ready);
                    })
                })
                .map_err(|source| Fatal::Io {
                    action: "starting a reactor thread".into(),
                    source,
                })?;
            reactors.push(thread);
        }
        drop(ready_sender);
        for index in 0..core_count {
            let ready = ready_receiver.recv().unwrap_or(Err(Fatal::ReactorPanicked));
            report_ready(index, ready?);
        }
        if let Some(spool) = spool {
            runtime.spawn(uplink::refill(spool.clone(), handovers));
            runtime.spawn(recover(spool, pending, tables));
        }
        runtime.spawn(tls.watch());
        admin.serve(&runtime, metrics.clone(), config.clone(), phase_seen);
        Ok(Node {
            config,
            listeners,
            admin: admin_address,
            reactors,
            ended,
            phase,
            runtime,
            metrics,
        })
    }

    /// The addresses it accepts on, in the order of the configuration, with real ports.
    pub fn listeners(&self) -> &[SocketAddr] {
        &self.listeners
    }

    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn metrics(&self) -> &Arc<NodeMetrics> {
        &self.metrics
    }

    /// The runtime beside the reactors.
    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }

    /// Whether a reactor has ended although nobody asked it to.
    pub fn reactor_ended(&self) -> bool {
        self.ended.try_recv().is_ok()
    }

    /// Takes no more connections, finishes the requests in flight, delivers what they left, and ends.
    ///
    /// `limits.drain` bounds each of the three: waiting for requests, for those that were cut, and for delivery.
    /// What could not be delivered is reported as an error.
    pub fn drain(self) -> Result<(), Fatal> {
        let _ = self.phase.send(Phase::Draining);
        let deadline = Instant::now() + 3 * self.config.limits.drain;
        for _ in 0..self.reactors.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.ended.recv_timeout(left).is_err() {
                let _ = self.phase.send(Phase::Ending);
                break;
            }
        }
        let mut batches_undelivered = 0;
        let mut panicked = false;
        for reactor in self.reactors {
            match reactor.join() {
                Ok(remainder) => batches_undelivered += remainder.batches_undelivered,
                Err(_) => panicked = true,
            }
        }
        let backlog_count = match &self.metrics.spool {
            Some(spool) => spool.segments.backlog_count(),
            None => 0,
        };
        if backlog_count > 0 {
            tracing::info!(
                batches = backlog_count,
                "undelivered batches stay in the spool, and are delivered after the next start"
            );
        }
        self.runtime.shutdown_background();
        if panicked {
            Err(Fatal::ReactorPanicked)
        } else if batches_undelivered > 0 {
            Err(Fatal::Undelivered {
                batches_undelivered,
            })
        } else {
            Ok(())
        }
    }
}

/// Brings what an earlier run left into the backlog, one batch at a time, while the node accepts already.
async fn recover<D: Disk>(
    spool: Arc<Spool<D>>,
    mut pending: Vec<PendingSegment>,
    tables: Vec<Table>,
) {
    if pending.is_empty() {
        return;
    }
    tracing::info!(
        segments = pending.len(),
        "an earlier run left batches in the spool"
    );
    let recovering = tokio::task::spawn_blocking(move || {
        let mut window = Region::map(FRAME_BUFFER_SIZE)?;
        let (mut row_count, mut batch_count) = (0, 0);
        for segments in pending_batches(&mut pending) {
            match spool.recover(segments, &tables, &mut window) {
                Ok(Some(batch)) => {
                    row_count += batch.totals.row_count;
                    batch_count += 1;
                    spool.segments().defer(batch);
                }
                Ok(None) => {}
                Err(error) => {
                    let segment = segments[0].found.slot.file_name();
                    tracing::error!(%error, segment, "a segment cannot be read now; it stays for the next start");
                }
            }
        }
        Ok::<_, std::io::Error>((row_count, batch_count))
    });
    match recovering.await.expect("recovering does not panic") {
        Ok((row_count, batch_count)) => tracing::info!(
            batches = batch_count,
            rows = row_count,
            "the spool is recovered, and is being delivered"
        ),
        Err(error) => {
            tracing::error!(%error, "the spool cannot be recovered now; it stays for the next start")
        }
    }
}

fn report_ready(core: usize, ready: Ready) {
    if core == 0
        && let Some(error) = ready.registration_refused
    {
        tracing::warn!(
            %error,
            "the slabs could not be registered with io_uring and are used unregistered, with the same bounds; \
             raise the memlock limit (ulimit -l, LimitMEMLOCK=) to register them"
        );
    }
}

/// Takes all the file descriptors it may have: the usual soft limit of 1,024 is there for programs that call `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of file descriptors could not be raised to its hard limit");
    }
}

/// The CPUs this process may use, in ascending order.
fn cpus_allowed() -> Vec<usize> {
    match sched_getaffinity(None) {
        Ok(allowed) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|cpu| allowed.is_set(*cpu))
            .collect(),
        Err(_) => Vec::new(),
    }
}
