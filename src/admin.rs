//! The admin server: `/metrics`, `/livez`, `/readyz`.
//!
//! Before it: [`crate::node`] has started everything else.
//! After it: nothing.
//! Thread: the uplink's runtime. Allocates: per request, bounded by the text it makes.
//! Invariant: it only reads; no request to it changes anything.
//! Not here: counting ([`crate::metrics`]).

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::config::Config;
use crate::error::Fatal;
use crate::metrics::{Count, Snapshot};
use crate::node::{KustoView, NodeMetrics, SpoolView};
use crate::reactor::Phase;
use crate::tls::Tls;
use crate::uplink::UplinkMetrics;

/// A reactor that has not ticked for this long is stuck.
const HEARTBEAT_AGE_MAX: Duration = Duration::from_secs(10);

/// A bound admin socket.
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
}

struct Shared {
    registry: Registry,
    metrics: Arc<NodeMetrics>,
    phase: watch::Receiver<Phase>,
    started_at: Instant,
}

impl Admin {
    pub fn bind(address: SocketAddr) -> Result<Admin, Fatal> {
        let fault = |source| Fatal::binding(address, source);
        let listener = TcpListener::bind(address).map_err(fault)?;
        listener.set_nonblocking(true).map_err(fault)?;
        let address = listener.local_addr().map_err(fault)?;
        Ok(Admin { listener, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves on `runtime` for as long as that lives.
    pub fn serve(
        self,
        runtime: &tokio::runtime::Runtime,
        metrics: Arc<NodeMetrics>,
        config: Arc<Config>,
        phase: watch::Receiver<Phase>,
    ) {
        let mut registry = Registry::with_prefix("weir");
        registry.register_collector(Box::new(NodeCollector {
            metrics: metrics.clone(),
            config,
        }));
        let shared = Arc::new(Shared {
            registry,
            metrics,
            phase,
            started_at: Instant::now(),
        });
        let router = Router::new()
            .route("/metrics", get(metrics_text))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .with_state(shared);
        runtime.spawn(async move {
            let served = match tokio::net::TcpListener::from_std(self.listener) {
                Ok(listener) => axum::serve(listener, router).await,
                Err(error) => Err(error),
            };
            if let Err(error) = served {
                tracing::error!(%error, "the admin server ended");
            }
        });
    }
}

async fn metrics_text(State(shared): State<Arc<Shared>>) -> Response {
    let mut body = String::new();
    match text::encode(&mut body, &shared.registry) {
        Ok(()) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], body).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let now = shared.started_at.elapsed();
    for (core, metrics) in shared.metrics.cores.iter().enumerate() {
        let heartbeat = Duration::from_secs(metrics.snapshot().value(Count::HeartbeatSeconds));
        if now.saturating_sub(heartbeat) > HEARTBEAT_AGE_MAX {
            let reason = format!("the reactor of core {core} does not tick\n");
            return (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
        }
    }
    "ok\n".into_response()
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let unavailable = |reason: String| (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
    if *shared.phase.borrow() != Phase::Running {
        return unavailable("draining\n".into());
    }
    for (core, metrics) in shared.metrics.cores.iter().enumerate() {
        if metrics.snapshot().value(Count::StorageFailed) > 0 {
            return unavailable(format!(
                "storage_fault: the disk of the spool failed under core {core}; it delivers what is durable and takes \
                 nothing more until weir is started anew\n"
            ));
        }
    }
    if let Some(spool) = &shared.metrics.spool
        && spool.segments.unclaimed_count() == 0
    {
        return unavailable(
            "spool_full: every segment holds a batch that is not delivered\n".into(),
        );
    }
    "ok\n".into_response()
}

/// Renders one snapshot, so that what belongs together in it stays together in the text.
struct NodeCollector {
    metrics: Arc<NodeMetrics>,
    config: Arc<Config>,
}

impl std::fmt::Debug for NodeCollector {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("NodeCollector")
            .finish_non_exhaustive()
    }
}

impl Collector for NodeCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let snapshot = self.metrics.snapshot();
        let mut page = Page { encoder };
        page.requests(&snapshot)?;
        page.tls(&self.metrics.tls)?;
        page.slabs(&snapshot, &self.config)?;
        page.upload_buffers(&snapshot)?;
        page.spool(&snapshot, &self.metrics)?;
        let uplink = &self.metrics.uplink;
        page.counter(
            "blobs",
            "Blobs delivered",
            uplink.blobs.load(Ordering::Relaxed),
        )?;
        page.counter(
            "blob_bytes",
            "Bytes of blobs delivered",
            uplink.blob_bytes.load(Ordering::Relaxed),
        )?;
        page.counter("delivered_rows", "Rows in blobs delivered", uplink.rows())?;
        page.counter(
            "delivery_failures",
            "Deliveries that failed and were tried again",
            uplink.failures.load(Ordering::Relaxed),
        )?;
        if let Some(kusto) = self.metrics.kusto.get() {
            page.kusto(kusto, uplink)?;
        }
        page.gauge(
            "resident_memory_bytes",
            "Resident memory of the process",
            resident_bytes(),
        )
    }
}

struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> std::fmt::Result {
        let metric = ConstCounter::new(value);
        let encoder = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode(encoder)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> std::fmt::Result {
        let metric = ConstGauge::new(value);
        let encoder = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        metric.encode(encoder)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) -> std::fmt::Result {
        let mut encoder = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (text, value) in values {
            let labels = [(label, text)];
            ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Vec<(&'static str, String)>, u64)>,
    ) -> std::fmt::Result {
        let mut encoder = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            ConstGauge::new(value).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn requests(&mut self, snapshot: &Snapshot) -> std::fmt::Result {
        let value = |count| snapshot.value(count);
        self.counter(
            "requests_received",
            "Requests with an outcome: the sum of weir_requests over its outcomes",
            value(Count::Received),
        )?;
        self.counters(
            "requests",
            "Requests by outcome",
            "outcome",
            [
                ("accepted", value(Count::Accepted)),
                ("rejected", value(Count::Rejected)),
                ("refused", value(Count::Refused)),
                ("aborted", value(Count::Aborted)),
            ],
        )?;
        self.counters(
            "rejects",
            "Requests that were the sender's fault, by code",
            "code",
            snapshot.rejects(),
        )?;
        self.counter(
            "records",
            "Records of accepted requests",
            value(Count::Records),
        )?;
        self.counter(
            "received_bytes",
            "Bytes read from connections",
            value(Count::BytesReceived),
        )?;
        self.counters(
            "refusals",
            "Requests answered 503, by code",
            "code",
            snapshot.refusals(),
        )?;
        self.counter(
            "records_unacknowledged",
            "Records of refused requests that became rows all the same",
            value(Count::RecordsUnacknowledged),
        )?;
        self.counter(
            "rows",
            "Rows put into upload buffers",
            value(Count::RowsAppended),
        )?;
        self.counter(
            "row_bytes",
            "Bytes of rows before compression",
            value(Count::RowBytes),
        )?;
        self.counter(
            "batches_sealed",
            "Upload buffers sealed",
            value(Count::BatchesSealed),
        )?;
        self.counter(
            "batch_bytes",
            "Bytes of sealed upload buffers: compressed",
            value(Count::BatchBytes),
        )?;
        self.counter(
            "connections_accepted",
            "Connections accepted",
            value(Count::Connections),
        )?;
        self.counter(
            "connections_refused",
            "Connections turned away because their address had too many",
            value(Count::ConnectionsRefused),
        )?;
        self.counter(
            "deadlines_passed",
            "Connections cut because the peer took too long, idle ones too",
            value(Count::DeadlinesPassed),
        )?;
        self.counter(
            "accept_errors",
            "Times that accepting failed",
            value(Count::AcceptErrors),
        )?;
        self.counter(
            "tls_handshakes",
            "TLS handshakes completed",
            value(Count::TlsHandshakes),
        )?;
        self.counter(
            "tls_failures",
            "TLS connections that ended with an error, in the handshake or after",
            value(Count::TlsFailures),
        )?;
        self.gauge(
            "connections",
            "Connections open",
            value(Count::ConnectionsOpen),
        )?;
        self.http2(snapshot)
    }

    fn http2(&mut self, snapshot: &Snapshot) -> std::fmt::Result {
        let value = |count| snapshot.value(count);
        self.counter(
            "http2_connections_accepted",
            "Connections that spoke HTTP/2",
            value(Count::Http2Connections),
        )?;
        self.counter(
            "http2_connections_refused",
            "Of those, turned away because http2.connections were open",
            value(Count::Http2ConnectionsRefused),
        )?;
        self.counters(
            "http2_goaways",
            "GOAWAY frames sent, by error code; an end without an error takes two or three",
            "code",
            snapshot.go_aways(),
        )?;
        self.gauge(
            "http2_connections",
            "Connections open that speak HTTP/2",
            value(Count::Http2ConnectionsOpen),
        )?;
        self.gauge(
            "http2_streams",
            "Streams that are served",
            value(Count::Http2StreamsOpen),
        )
    }

    fn tls(&mut self, tls: &Tls) -> std::fmt::Result {
        let expiries = tls.expiries().map(|(listener, expires_at)| {
            let labels = vec![("listener", listener.to_string())];
            (labels, expires_at.max(0) as u64)
        });
        self.gauges(
            "tls_certificate_expiry_seconds",
            "When the certificate of a listener expires, in seconds since 1970",
            expiries,
        )?;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.counter(
            "tls_reloads",
            "Times that changed certificates were taken",
            load(&tls.reloads),
        )?;
        self.counter(
            "tls_reload_failures",
            "Times that changed certificates were not taken, as they do not work",
            load(&tls.reload_failures),
        )
    }

    fn slabs(&mut self, snapshot: &Snapshot, config: &Config) -> std::fmt::Result {
        self.gauge(
            "slabs_registered_cores",
            "Cores whose slabs are registered with io_uring",
            snapshot.value(Count::SlabsRegistered),
        )?;
        let states = ["free", "parsing", "in_kernel"];
        let values = config
            .slabs
            .classes
            .iter()
            .enumerate()
            .flat_map(|(class_index, class)| {
                states
                    .into_iter()
                    .zip(snapshot.slabs(class_index))
                    .map(move |(state, value)| {
                        (
                            vec![
                                ("size", class.size.to_string()),
                                ("state", state.to_owned()),
                            ],
                            value,
                        )
                    })
            });
        self.gauges("slabs", "Slabs by size and state", values)
    }

    /// At rest, records + records_unacknowledged + recovered_rows = rows_in_memory + rows_in_spool + delivered_rows
    /// + dead_letter_rows.
    fn spool(&mut self, snapshot: &Snapshot, metrics: &NodeMetrics) -> std::fmt::Result {
        let value = |count| snapshot.value(count);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let uplink = &metrics.uplink;
        let durable = value(Count::RowsDurable);
        let in_memory = value(Count::RowsAppended)
            .saturating_sub(durable)
            .saturating_sub(load(&uplink.rows_unspooled))
            .saturating_sub(load(&uplink.dead_rows_unspooled));
        self.gauge(
            "rows_in_memory",
            "Rows in upload buffers that are neither durable nor delivered",
            in_memory,
        )?;
        let Some(SpoolView { segments, metrics }) = &metrics.spool else {
            return Ok(());
        };
        let in_spool = (durable + load(&metrics.rows_recovered))
            .saturating_sub(load(&uplink.rows_spooled))
            .saturating_sub(load(&uplink.dead_rows_spooled));
        self.gauge(
            "rows_in_spool",
            "Durable rows that are not delivered",
            in_spool,
        )?;
        self.counter("commits", "Group commits", value(Count::Commits))?;
        self.counter(
            "commit_bytes",
            "Bytes written by commits",
            value(Count::CommitBytes),
        )?;
        self.counter(
            "commit_microseconds",
            "Time between the begin of commits and the return of their sync",
            value(Count::CommitMicroseconds),
        )?;
        self.counter(
            "commit_failures",
            "Commits that failed",
            value(Count::CommitFailures),
        )?;
        self.gauge(
            "storage_failed_cores",
            "Cores on which nothing more can become durable",
            value(Count::StorageFailed),
        )?;
        self.gauge(
            "spool_segments",
            "Segments that spool.size has room for",
            segments.count() as u64,
        )?;
        self.gauge(
            "spool_segments_free",
            "Segments that hold nothing",
            segments.unclaimed_count() as u64,
        )?;
        self.gauge(
            "spool_backlog_batches",
            "Batches that wait for delivery in the spool alone",
            segments.backlog_count() as u64,
        )?;
        for (name, help, counter) in [
            (
                "recovered_batches",
                "Batches an earlier run left",
                &metrics.batches_recovered,
            ),
            (
                "recovered_rows",
                "Rows an earlier run left",
                &metrics.rows_recovered,
            ),
            (
                "torn_frames",
                "Commits cut off by a crash, which were never acknowledged",
                &metrics.torn_frames,
            ),
            ("torn_rows", "Rows of such commits", &metrics.rows_torn),
            (
                "quarantined_segments",
                "Damaged segments put aside",
                &metrics.segments_quarantined,
            ),
            (
                "quarantined_rows",
                "Rows in damaged segments that cannot be read",
                &metrics.rows_quarantined,
            ),
            (
                "retire_failures",
                "Deliveries that could not be recorded",
                &metrics.retire_failures,
            ),
        ] {
            self.counter(name, help, load(counter))?;
        }
        Ok(())
    }

    fn kusto(&mut self, view: &KustoView, uplink: &UplinkMetrics) -> std::fmt::Result {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (delivery, refresh) = (view.kusto.delivery_metrics(), view.kusto.refresh_metrics());
        for (name, help, value) in [
            (
                "dead_letter_rows",
                "Rows that became dead letters",
                uplink.dead_rows(),
            ),
            (
                "dead_letter_expired_rows",
                "Rows of dead letters removed for their age",
                view.dead_letters.rows_expired(),
            ),
            (
                "kusto_blobs_put",
                "Blobs put into a container",
                load(&delivery.blobs_put),
            ),
            (
                "kusto_blobs_found",
                "Blobs that an earlier attempt had put",
                load(&delivery.blobs_found),
            ),
            (
                "kusto_put_failures",
                "Containers that did not take a blob",
                load(&delivery.put_failures),
            ),
            (
                "kusto_messages_posted",
                "Messages that a queue took",
                load(&delivery.messages_posted),
            ),
            (
                "kusto_post_failures",
                "Queues that did not take a message",
                load(&delivery.post_failures),
            ),
            (
                "kusto_refreshes",
                "Times that containers, queues and identity token were fetched",
                load(&refresh.refreshes),
            ),
            (
                "kusto_refresh_failures",
                "Times that fetching them failed",
                load(&refresh.refresh_failures),
            ),
        ] {
            self.counter(name, help, value)?;
        }
        self.gauge(
            "dead_letter_batches",
            "Dead letters held",
            view.dead_letters.held_count(),
        )?;
        self.gauge(
            "dead_letter_bytes",
            "Bytes of dead letters held",
            view.dead_letters.held_size(),
        )
    }

    fn upload_buffers(&mut self, snapshot: &Snapshot) -> std::fmt::Result {
        let states = [
            ("free", Count::UploadBuffersFree),
            ("open", Count::UploadBuffersOpen),
            ("sealed", Count::UploadBuffersSealed),
            ("in_uplink", Count::UploadBuffersInUplink),
        ];
        self.gauges(
            "upload_buffers",
            "Upload buffers by state",
            states.map(|(state, count)| (vec![("state", state.to_owned())], snapshot.value(count))),
        )
    }
}

/// `VmRSS`: the second figure of `/proc/self/statm`, in pages (`proc_pid_statm(5)`). 0 where it cannot be read.
pub fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|statm| statm.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}
