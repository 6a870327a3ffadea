//! A node: the reactors, the uplink and the admin server, from start to drain.
//!
//! Before it: [`crate::cli`] has a valid configuration.
//! After it: [`crate::reactor`] and [`crate::uplink`] do the work until [`Node::drain`].
//! Thread: the caller's. Allocates: freely, at start.
//! Invariant: a node that started accepts on every listener; one that could not start has said why, and left nothing
//! running.

use std::net::SocketAddr;
use std::sync::Arc;
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
use crate::config::Config;
use crate::error::Fatal;
use crate::metrics::{CoreMetrics, Snapshot};
use crate::reactor::{Phase, Reactor, Ready, Remainder};
use crate::uplink::{Handover, Sink, Uplink, UplinkMetrics};

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
        let admission = Arc::new(Admission::load(&config)?);
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
            .max_blocking_threads(core_count)
            .thread_name("weir-uplink")
            .enable_all()
            .build()
            .map_err(|source| Fatal::Io {
                action: "starting the uplink runtime".into(),
                source,
            })?;
        let started_at = jiff::Timestamp::now()
            .strftime("%Y%m%dT%H%M%S%6fZ")
            .to_string();
        let sink = Arc::new(Sink::open(
            &config,
            &format!("weir-{started_at}-{}", std::process::id()),
        )?);
        let metrics = Arc::new(NodeMetrics {
            cores: (0..core_count)
                .map(|_| Arc::new(CoreMetrics::new()))
                .collect(),
            uplink: Arc::new(UplinkMetrics::default()),
        });
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let admin = Admin::bind(config.admin.address)?;
        let admin_address = admin.address();

        let cpus = cpus_allowed();
        let (ready_sender, ready_receiver) = mpsc::channel();
        let (end_sender, ended) = mpsc::channel();
        let mut reactors = Vec::with_capacity(core_count);
        for (index, listeners) in sockets.into_iter().enumerate() {
            let handover = Arc::new(Handover::new(config.upload.buffer_count));
            runtime.spawn(
                Uplink {
                    handover: handover.clone(),
                    sink: sink.clone(),
                    metrics: metrics.uplink.clone(),
                }
                .run(),
            );
            let reactor = Reactor {
                index,
                cpu: (core_count <= cpus.len()).then(|| cpus[index]),
                config: config.clone(),
                admission: admission.clone(),
                listeners,
                handover,
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
