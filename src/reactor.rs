//! One core: a pinned thread, its ring, and everything that only this core touches.
//!
//! Before it: [`crate::node`] has a valid configuration and bound sockets.
//! After it: nothing; requests come in by [`crate::accept`] and leave as batches to [`crate::uplink`].
//! Thread: this is the thread. Allocates: everything, at start.
//! Invariant: nothing on the path of a request is shared with another thread but the metrics, which only this one
//! writes, and one atomic per configured rate, which all cores keep together.

use std::cell::{Cell, RefCell};
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::sync::{mpsc, watch};

use crate::accept::{self, Connections};
use crate::clock::Clock;
use crate::commit;
use crate::config::Registered;
use crate::connection::http2::Http2;
use crate::encoder::Encoder;
use crate::error::{Fatal, Refusal, Reject};
use crate::limits::{FRAME_BUFFER_SIZE, RING_ENTRY_COUNT};
use crate::live::{Live, Settings, Swap};
use crate::memory::Region;
use crate::metrics::{CoreMetrics, Count};
use crate::slab::Slabs;
use crate::spool::Segments;
use crate::spool::disk::Disk;
use crate::tls::Tls;
use crate::uplink::{Handover, Returned};
use crate::upload_buffer::UploadBuffers;

/// How often a core looks at the ages of its upload buffers and publishes its gauges.
const TICK: Duration = Duration::from_millis(100);

/// What a reactor is started with.
pub struct Reactor<D> {
    /// UUIDv7 of this run of the process.
    pub run: uuid::Uuid,
    pub index: usize,
    /// The CPU to be pinned to; none where there are fewer CPUs than cores.
    pub cpu: Option<usize>,
    pub tls: Arc<Tls>,
    pub settings: Settings,
    /// Settings to go on with.
    pub swaps: mpsc::Receiver<Swap>,
    /// In the order of the configuration.
    pub listeners: Vec<TcpListener>,
    pub handover: Arc<Handover>,
    /// The free segments and the disk they are on, where a table is spooled.
    pub spool: Option<(Arc<Segments>, D)>,
    pub metrics: Arc<CoreMetrics>,
    /// The phase of the node's life; a change wakes the reactor.
    pub phase: watch::Receiver<Phase>,
    /// Answer requests without looking at them: what receiving alone costs, for `weir-perf`.
    pub floor_receive: bool,
}

/// The phases of a node's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Running,
    /// No new connections; requests in flight are finished, batches delivered.
    Draining,
    /// The time to deliver is over.
    Ending,
}

/// What a reactor says when it can accept.
#[derive(Debug)]
pub struct Ready {
    /// Why the slabs are not registered, where they are not.
    pub registration_refused: Option<std::io::Error>,
}

/// What was left when a reactor ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Remainder {
    pub batches_undelivered: usize,
}

/// Everything that belongs to one core.
pub struct Core {
    /// See [`Core::live`].
    live: RefCell<Rc<Live>>,
    pub clock: Clock,
    pub slabs: Rc<Slabs>,
    pub encoder: Encoder,
    pub upload_buffers: Rc<UploadBuffers>,
    pub tls: Arc<Tls>,
    pub connections: Connections,
    pub http2: Http2,
    pub metrics: Arc<CoreMetrics>,
    pub floor_receive: bool,
    draining: Cell<bool>,
}

impl Core {
    /// Whether this core finishes what it has and takes no more.
    pub fn draining(&self) -> bool {
        self.draining.get()
    }

    /// What a reload may replace, as it is now. Whoever holds it keeps it as it is: what belongs together has to come
    /// from one of them.
    pub fn live(&self) -> Rc<Live> {
        self.live.borrow().clone()
    }

    /// Goes by other settings from now on.
    fn reload(&self, settings: &Settings) {
        self.connections.reload(&settings.config);
        self.live.replace(Rc::new(Live::new(settings)));
    }

    /// Until when a request that begins to wait now may wait: `limits.wait`, and up to two periods of a sweep more, for
    /// most requests have not to wait at all and shall not look at the clock for it.
    pub fn wait_deadline(&self) -> Instant {
        self.connections.deadlines.soon() + self.live().config.limits.wait
    }

    pub fn count_received(&self, size: usize) {
        self.metrics
            .update(|update| update.add(Count::BytesReceived, size as u64));
    }

    /// Counts an accepted request.
    pub fn count_accepted(&self, record_count: u64, row_bytes: u64) {
        self.metrics.update(|update| {
            update.add(Count::Received, 1);
            update.add(Count::Accepted, 1);
            update.add(Count::Records, record_count);
            update.add(Count::RowBytes, row_bytes);
        });
    }

    /// Counts rows whose request is refused although they may be stored.
    pub fn count_unacknowledged(&self, row_count: u64) {
        self.metrics
            .update(|update| update.add(Count::RecordsUnacknowledged, row_count));
    }

    pub fn count_refused(&self, refusal: Refusal) {
        self.metrics.update(|update| {
            update.add(Count::Received, 1);
            update.add(Count::Refused, 1);
            update.add_refusal(refusal);
        });
    }

    /// Counts a request whose peer went away.
    pub fn count_aborted(&self) {
        self.metrics.update(|update| {
            update.add(Count::Received, 1);
            update.add(Count::Aborted, 1);
        });
    }

    /// Counts a request that the peer got wrong.
    pub fn count_reject(&self, reject: &Reject) {
        let outcome = match reject {
            Reject::BodyTruncated => Count::Aborted,
            _ => Count::Rejected,
        };
        self.metrics.update(|update| {
            update.add(Count::Received, 1);
            update.add(outcome, 1);
            update.add_reject(reject);
        });
    }

    fn publish_gauges(&self, started_at: Instant) {
        let buffers = self.upload_buffers.counts();
        self.metrics.update(|update| {
            for class_index in 0..self.slabs.class_count() {
                update.set_slabs(class_index, self.slabs.counts(class_index));
            }
            update.set(Count::UploadBuffersFree, buffers.free as u64);
            update.set(Count::UploadBuffersOpen, buffers.open as u64);
            update.set(Count::UploadBuffersSealed, buffers.sealed as u64);
            update.set(Count::UploadBuffersInUplink, buffers.in_uplink as u64);
            update.set(Count::HeartbeatSeconds, started_at.elapsed().as_secs());
            let storage_failed = self.upload_buffers.storage_failed();
            update.set(Count::StorageFailed, u64::from(storage_failed));
        });
    }
}

impl<D: Disk> Reactor<D> {
    /// Runs the core on the calling thread until the node ends. `ready` is told once, before anything is accepted.
    pub fn run(self, ready: impl FnOnce(Result<Ready, Fatal>)) -> Remainder {
        if let Some(cpu) = self.cpu {
            let mut cpus = CpuSet::new();
            cpus.set(cpu);
            if let Err(error) = sched_setaffinity(None, &cpus) {
                tracing::warn!(core = self.index, cpu, %error, "the reactor could not be pinned");
            }
        }
        let mut ring = io_uring::IoUring::builder();
        ring.setup_coop_taskrun().setup_single_issuer();
        let runtime = tokio_uring::Runtime::new(
            tokio_uring::builder()
                .entries(RING_ENTRY_COUNT as u32)
                .uring_builder(&ring),
        );
        match runtime {
            Ok(runtime) => runtime.block_on(self.run_on_ring(ready)),
            Err(source) => {
                ready(Err(match source.kind() {
                    std::io::ErrorKind::OutOfMemory => Fatal::RingRefused { source },
                    _ => Fatal::IoUringRefused { source },
                }));
                Remainder::default()
            }
        }
    }

    async fn run_on_ring(mut self, ready: impl FnOnce(Result<Ready, Fatal>)) -> Remainder {
        let (core, registration_refused) = match self.build() {
            Ok(built) => built,
            Err(fatal) => {
                ready(Err(fatal));
                return Remainder::default();
            }
        };
        let started_at = Instant::now();
        core.publish_gauges(started_at);
        let mut listeners = Vec::new();
        for (listener_index, listener) in self.listeners.into_iter().enumerate() {
            match listener.try_clone() {
                Ok(same) => listeners.push(socket2::Socket::from(same)),
                Err(source) => {
                    ready(Err(Fatal::Io {
                        action: "duplicating a listener".into(),
                        source,
                    }));
                    return Remainder::default();
                }
            }
            let listener = tokio_uring::net::TcpListener::from_std(listener);
            tokio_uring::spawn(accept::accept(core.clone(), listener, listener_index));
        }
        tokio_uring::spawn(tick(core.clone(), started_at));
        tokio_uring::spawn(accept::sweep_deadlines(core.clone()));
        tokio_uring::spawn(take_returns(core.clone(), self.handover.clone()));
        tokio_uring::spawn(take_swaps(core.clone(), self.swaps));
        if let Some((_, disk)) = self.spool {
            let frame = match Region::map(FRAME_BUFFER_SIZE) {
                Ok(frame) => frame,
                Err(source) => {
                    ready(Err(Fatal::Io {
                        action: "mapping the frame buffer".into(),
                        source,
                    }));
                    return Remainder::default();
                }
            };
            let (buffers, metrics) = (core.upload_buffers.clone(), core.metrics.clone());
            tokio_uring::spawn(commit::commit(buffers, disk, frame, metrics));
        }
        ready(Ok(Ready {
            registration_refused,
        }));

        // A closed channel means that the node is gone: end as well.
        let reached = |phase: Phase| move |current: &Phase| *current >= phase;
        let _ = self.phase.wait_for(reached(Phase::Draining)).await;
        core.draining.set(true);
        for listener in &listeners {
            // An accept in flight cannot be cancelled, but it fails when its socket is shut down.
            let _ = listener.shutdown(std::net::Shutdown::Both);
        }
        core.connections.wake_idle();
        core.connections_ended().await;
        core.upload_buffers.seal_older_than(Duration::ZERO);
        tokio::select! {
            () = core.upload_buffers.all_returned() => {}
            _ = self.phase.wait_for(reached(Phase::Ending)) => {}
        }
        core.publish_gauges(started_at);
        Remainder {
            batches_undelivered: core.upload_buffers.unspooled_in_uplink_count(),
        }
    }

    fn build(&self) -> Result<(Rc<Core>, Option<std::io::Error>), Fatal> {
        let config = &*self.settings.config;
        let requests_max = config.requests_max();
        let (slabs, refused) =
            Slabs::map(&config.slabs.classes, config.slabs.registered, requests_max).map_err(
                |source| Fatal::Io {
                    action: "mapping the slabs".into(),
                    source,
                },
            )?;
        if config.slabs.registered == Registered::Require
            && let Some(source) = refused
        {
            let size = (config.cores * config.slabs.size()) as u64;
            return Err(Fatal::SlabsNotRegistered { size, source });
        }
        let upload_buffers = UploadBuffers::map(
            self.run,
            self.index,
            config,
            self.spool.as_ref().map(|(segments, _)| segments.clone()),
            self.handover.clone(),
            self.metrics.clone(),
        )
        .map_err(|source| Fatal::Io {
            action: "mapping the upload buffers".into(),
            source,
        })?;
        self.metrics.update(|update| {
            update.set(Count::SlabsRegistered, u64::from(slabs.registered()));
        });
        let core = Core {
            live: RefCell::new(Rc::new(Live::new(&self.settings))),
            clock: Clock::new(),
            encoder: Encoder::new(slabs.size_max(), config.limits.record, requests_max),
            slabs,
            upload_buffers: Rc::new(upload_buffers),
            tls: self.tls.clone(),
            connections: Connections::new(config),
            http2: Http2::new(config),
            metrics: self.metrics.clone(),
            floor_receive: self.floor_receive,
            draining: Cell::new(false),
        };
        Ok((Rc::new(core), refused))
    }
}

impl Core {
    /// Completes when every connection has ended; those that take longer than `limits.drain` are cut.
    async fn connections_ended(&self) {
        let drain = self.live().config.limits.drain;
        if !self.connections.all_ended(Instant::now() + drain).await {
            tracing::warn!(
                connections = self.connections.open_count(),
                "cutting connections that are still open"
            );
            self.connections.cut_all();
            // Whatever they wait for in the kernel fails now; only an encoder in wait of a buffer may take longer.
            self.connections.all_ended(Instant::now() + drain).await;
        }
    }
}

/// Seals upload buffers by age, and publishes the gauges.
async fn tick(core: Rc<Core>, started_at: Instant) {
    loop {
        let max_age = core.live().config.batch.max_age;
        let tick = TICK.min(max_age / 4).max(Duration::from_millis(1));
        tokio::time::sleep(tick).await;
        // A blob is sealed at `max_age` at the latest, so at the last tick before it.
        let age = max_age.saturating_sub(tick);
        core.upload_buffers.seal_older_than(age);
        core.publish_gauges(started_at);
    }
}

/// Takes new settings over, for as long as the node lives.
async fn take_swaps(core: Rc<Core>, mut swaps: mpsc::Receiver<Swap>) {
    while let Some(swap) = swaps.recv().await {
        core.reload(&swap.settings);
        // Whoever asked may have gone.
        let _ = swap.taken.send(());
    }
}

/// Takes upload buffers back from the uplink, and hears what is delivered.
async fn take_returns(core: Rc<Core>, handover: Arc<Handover>) {
    let buffers = &core.upload_buffers;
    loop {
        match handover.returned().await {
            Returned::Buffer(buffer) => buffers.give_back(buffer),
            Returned::Delivered(delivered) => buffers.delivered(&delivered),
            Returned::Nudge => buffers.look_again(),
        }
    }
}
