//! The configuration: parsed once, then valid and immutable.
//!
//! Comes first in a node's life: `cli.rs` loads it, `budget.rs` adds it up, the reactors read it.
//! A [`Config`] exists only if every check passed, so nobody after this file checks again.
//! Main thread before any reactor starts, and the uplink's runtime at a reload; it allocates freely.
//!
//! The text becomes a `Config` in two steps, both in submodules:
//! `config/raw.rs` is the shape of the file (which keys there are, what type each has),
//! `config/validate.rs` is what the values must satisfy.
//! `config/reload.rs` is what of a new file a running node takes over.
//! `config/size.rs` reads and writes sizes; `config/error.rs` places a message on a line and column.
//!
//! Invariant: the defaults are in one place, [`Config::default`], and an empty file means them.
//!
//! Not here: bounds (`limits.rs`), sums (`budget.rs`), matching of paths (`route.rs`).
//! What each key means to an operator is in `docs/CONFIG.md`, which a test holds to this code.

mod access;
mod error;
mod kusto;
mod raw;
pub mod reload;
mod size;
#[cfg(test)]
mod tests;
mod validate;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use crate::error::Fatal;
use crate::limits::{GIB, KIB, MIB, segment_size};
use crate::secret::SecretSource;

pub use error::{ConfigError, ConfigErrors};
pub use kusto::{Identity, KustoConfig, Mode};
pub use size::{Size, SizeInvalid};

/// A valid configuration. Fields are named like the keys they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Reactors to start, each pinned to its own CPU: 1 to the CPUs this process may use.
    pub cores: usize,
    /// At least one; addresses differ unless the port is 0.
    pub listeners: Vec<Listener>,
    pub admin: Admin,
    pub destination: Destination,
    pub spool: Spool,
    pub uplink: Uplink,
    pub dead_letter: DeadLetter,
    pub batch: Batch,
    pub compression: Compression,
    pub response: Response,
    pub slabs: Slabs,
    pub upload: Upload,
    pub limits: Limits,
    pub deadlines: Deadlines,
    pub http2: Http2,
    pub memory: Memory,
    /// Names differ.
    pub principals: Vec<Principal>,
    /// At least one, in the order of the file; patterns differ.
    pub routes: Vec<Route>,
    /// The tables that the routes name, each once, in order of first mention.
    pub tables: Vec<Table>,
}

/// Where requests are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// Indexes in [`Config::principals`]: who may send; `None` for anybody.
    pub principals: Option<Vec<usize>>,
    /// Where from; empty for anywhere.
    pub allow: Vec<IpNet>,
    /// Whose connections begin with a PROXY header.
    pub proxies: Vec<IpNet>,
    /// Whether HTTP/2 is spoken here, beside HTTP/1.1.
    pub http2: bool,
    /// Plain TCP without it.
    pub tls: Option<ListenerTls>,
}

/// How a listener speaks TLS: the files, read when the node starts and whenever they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// PEM: the listener's certificate, then those that signed it.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    /// Who may sign certificates of clients.
    pub client: Option<ClientAuth>,
}

/// Mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAuth {
    /// PEM: the certificates that sign those of clients.
    pub ca: PathBuf,
    /// PEM: what they have revoked.
    pub crl: Option<PathBuf>,
    /// Whether a client may do without a certificate.
    pub optional: bool,
}

/// Where metrics and health are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Port 0 lets the kernel choose.
    pub address: SocketAddr,
}

/// Where blobs go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Files below `path`, which is already joined to the configuration's directory.
    Directory { path: PathBuf },
    /// Nowhere: blobs are dropped once they are compressed.
    Null,
    /// Azure Data Explorer.
    Kusto(KustoConfig),
}

/// Where batches are kept until they are delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spool {
    /// Already joined to the configuration's directory.
    pub directory: PathBuf,
    /// Bytes, all cores together; room for at least two batches per core.
    pub size: u64,
}

/// How batches are delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Blobs that are on their way to Kusto at a time.
    pub concurrency: usize,
}

/// Where batches go that the destination will never take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Already joined to the configuration's directory.
    pub directory: PathBuf,
    /// Bytes; what does not fit stays in the spool.
    pub size: u64,
    /// The age at which a dead letter is removed; `None` is never.
    pub age: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The age at which an upload buffer is sealed at the latest.
    pub max_age: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compression {
    /// Deflate level, 1 (fast) to 9 (small).
    pub level: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: SuccessStatus,
}

/// The status of an accepted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuccessStatus {
    Ok,
    Created,
    /// The answer has no body.
    NoContent,
}

impl SuccessStatus {
    pub const fn code(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::Created => 201,
            Self::NoContent => 204,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slabs {
    pub registered: Registered,
    /// Sizes strictly ascend; counts per core add up to at most `limits::SLAB_COUNT_MAX`.
    pub classes: Vec<SlabClass>,
}

impl Slabs {
    /// Slabs of one core, all classes.
    pub fn count(&self) -> usize {
        self.classes.iter().map(|class| class.count).sum()
    }

    /// Bytes of one core's slabs, all classes.
    pub fn size(&self) -> usize {
        self.classes
            .iter()
            .map(|class| class.size * class.count)
            .sum()
    }

    /// The largest class's size: the largest request there can be.
    pub fn size_max(&self) -> usize {
        self.classes
            .last()
            .expect("a valid configuration has a slab class")
            .size
    }
}

/// Whether the kernel registers (and pins) the slabs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// Registered where memlock allows, else the same slabs unregistered.
    Prefer,
    /// Registered, or weir does not start.
    Require,
    Never,
}

/// One size of slab, per core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabClass {
    /// Bytes of each; a multiple of the page.
    pub size: usize,
    pub count: usize,
}

/// The upload buffers of one core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    pub buffer_count: usize,
    /// Bytes of each; takes at least one record of `limits.record`.
    pub buffer_size: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a request waits for a slab or an upload buffer before 503.
    pub wait: Duration,
    /// Open connections per core.
    pub connections: usize,
    /// Of those, from one address.
    pub connections_per_address: usize,
    /// Requests until a connection is closed.
    pub requests_per_connection: u64,
    /// Bytes of the largest record, compacted; more is 413.
    pub record: usize,
    /// How long a request on a route with `ack = "delivered"` waits for the delivery before 503.
    pub ack: Duration,
    /// How long a shutdown waits for requests in flight and for delivery.
    pub drain: Duration,
}

/// How long a peer may take; `deadline.rs` sweeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// A whole TLS handshake, from the accept or the PROXY header.
    pub handshake: Duration,
    /// A whole head, from its first byte.
    pub head: Duration,
    /// The first byte of a body, from the end of its head.
    pub body_start: Duration,
    /// A whole body.
    pub body: Duration,
    /// Bytes per second that a body must bring, on average over `body_rate_window`.
    pub body_rate: usize,
    pub body_rate_window: Duration,
    /// How long a head, or a stretch of a body, may keep a slab that somebody waits for.
    pub contended: Duration,
    /// Writing the answers.
    pub write: Duration,
    /// Between two requests.
    pub idle: Duration,
}

/// HTTP/2, where a listener speaks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http2 {
    /// Connections of it that may be open, per core.
    pub connections: usize,
    /// Of each, streams at a time.
    pub streams: usize,
    /// Bytes that a stream may send before it is told that there is room for more.
    pub window: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes the whole process may plan for; `None` leaves only the control group's limit.
    pub limit: Option<u64>,
}

/// What happens to the requests of some paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub pattern: PathPattern,
    /// Index in [`Config::tables`].
    pub table_index: usize,
    pub envelope: Envelope,
    pub ack: Ack,
    /// The tag of the path `/`; needs no escaping in JSON.
    pub default_tag: String,
    /// In place of the listener's.
    pub principals: Option<Vec<usize>>,
    /// Besides the listener's.
    pub allow: Vec<IpNet>,
    pub rate: Option<Rate>,
}

/// Somebody who may send, known by one kind of credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub name: String,
    pub credential: Credential,
    pub rate: Option<Rate>,
}

/// What a principal shows. Of several secrets any will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// RFC 6750.
    Bearer(Vec<Token>),
    /// RFC 7617.
    Basic {
        user: String,
        passwords: Vec<SecretSource>,
    },
    Hmac(Hmac),
    /// Any of these names in a certificate of a client: an RFC 4514 string, `dns:NAME` or `uri:URI`.
    Certificate(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token {
    Secret(SecretSource),
    /// The hash of one that is long and random.
    Sha256([u8; 32]),
}

/// HMAC-SHA-256 over the body as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hmac {
    pub secrets: Vec<SecretSource>,
    /// The field that has the signature.
    pub header: String,
    /// What is before it in there.
    pub prefix: String,
    pub encoding: SignatureEncoding,
}

impl Default for Hmac {
    /// What GitHub sends, without secrets.
    fn default() -> Self {
        Hmac {
            secrets: Vec::new(),
            header: "X-Hub-Signature-256".into(),
            prefix: "sha256=".into(),
            encoding: SignatureEncoding::Hex,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureEncoding {
    Hex,
    /// RFC 4648 §4, with padding.
    Base64,
}

/// How much may be sent, on the whole node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Per second.
    pub requests: Option<u64>,
    /// Of bodies, per second.
    pub bytes: Option<u64>,
    /// How much of that may come at once after a pause.
    pub burst: Duration,
}

/// The paths a route serves; `route.rs` matches them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// This path alone.
    Exact(String),
    /// Every path that starts with this; it ends in `/`. The pattern `/*` is the prefix `/`.
    Prefix(String),
}

impl fmt::Display for PathPattern {
    /// As it is configured.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Prefix(path) => write!(f, "{path}*"),
        }
    }
}

/// What is written around each record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// `{"timestamp":…,"tag":…,"log":<record>}`
    FluentBit,
    /// The record itself.
    None,
}

/// What a success answer promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// The records are in memory; a crash loses them.
    Memory,
    /// The records are in the spool, and synced.
    Durable,
    /// The records are at their destination.
    Delivered,
}

impl Ack {
    /// As it is configured, and as the answer says it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Durable => "durable",
            Self::Delivered => "delivered",
        }
    }
}

/// A Kusto table, with what all rows of one upload buffer have in common: routes that differ in any of it share no
/// blob.
/// Both names are safe as the name of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    pub database: String,
    pub table: String,
    /// The name of a JSON mapping; without one, properties go to the columns of their names.
    pub mapping: Option<String>,
    pub dedup: Dedup,
    /// Whether its batches go through the spool. Routes with `ack = "memory"` do not share a batch with others.
    pub spooled: bool,
    /// Whether a route of it promises delivery.
    pub delivered: bool,
}

/// What keeps a blob that was sent twice from being ingested twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dedup {
    /// The service's own check within a batch.
    Off,
    /// A tag on the extent, checked at ingestion; each blob is a batch of its own then.
    IngestBy,
}

impl Default for Config {
    /// What an empty file means, with paths relative to the working directory.
    fn default() -> Self {
        Self {
            cores: 1,
            listeners: vec![Listener {
                address: SocketAddr::from(([127, 0, 0, 1], 9880)),
                principals: None,
                allow: Vec::new(),
                proxies: Vec::new(),
                http2: false,
                tls: None,
            }],
            admin: Admin {
                address: SocketAddr::from(([127, 0, 0, 1], 9881)),
            },
            destination: Destination::Directory { path: "out".into() },
            spool: Spool {
                directory: "weir-data/spool".into(),
                size: GIB as u64,
            },
            uplink: Uplink { concurrency: 4 },
            dead_letter: DeadLetter {
                directory: "weir-data/dead-letter".into(),
                size: GIB as u64,
                age: None,
            },
            batch: Batch {
                max_age: Duration::from_secs(10),
            },
            compression: Compression { level: 2 },
            response: Response {
                status: SuccessStatus::Created,
            },
            slabs: Slabs {
                registered: Registered::Prefer,
                classes: vec![
                    SlabClass {
                        size: 16 * KIB,
                        count: 64,
                    },
                    SlabClass {
                        size: 256 * KIB,
                        count: 32,
                    },
                    SlabClass {
                        size: 8 * MIB,
                        count: 4,
                    },
                ],
            },
            upload: Upload {
                buffer_count: 4,
                buffer_size: 4 * MIB,
            },
            limits: Limits {
                wait: Duration::from_secs(5),
                connections: 1024,
                connections_per_address: 256,
                requests_per_connection: 100_000,
                // The largest value of Kusto's `dynamic` type.
                record: MIB,
                // Senders of webhooks give up after ten seconds.
                ack: Duration::from_secs(8),
                drain: Duration::from_secs(30),
            },
            deadlines: Deadlines {
                handshake: Duration::from_secs(10),
                head: Duration::from_secs(10),
                body_start: Duration::from_secs(20),
                body: Duration::from_secs(120),
                body_rate: KIB,
                body_rate_window: Duration::from_secs(10),
                contended: Duration::from_secs(1),
                write: Duration::from_secs(10),
                idle: Duration::from_secs(75),
            },
            http2: Http2 {
                connections: 8,
                streams: 100,
                window: 64 * KIB,
            },
            memory: Memory { limit: None },
            principals: Vec::new(),
            routes: vec![Route {
                pattern: PathPattern::Prefix("/".into()),
                table_index: 0,
                envelope: Envelope::FluentBit,
                ack: Ack::Durable,
                default_tag: "http.0".into(),
                principals: None,
                allow: Vec::new(),
                rate: None,
            }],
            tables: vec![Table {
                database: "Telemetry".into(),
                table: "Events".into(),
                mapping: None,
                dedup: Dedup::Off,
                spooled: true,
                delivered: false,
            }],
        }
    }
}

impl Config {
    /// Reads and checks the file at `path`; relative paths in it are relative to its directory.
    pub fn load(path: &Path) -> Result<Self, Fatal> {
        let text = std::fs::read_to_string(path).map_err(|source| Fatal::ConfigUnreadable {
            path: path.into(),
            source,
        })?;
        let base_dir = path.parent().unwrap_or(Path::new(""));
        Ok(Self::parse(&text, path, base_dir)?)
    }

    /// Checks `text`. Messages name `path`; relative paths in the text are joined to `base_dir`.
    pub fn parse(text: &str, path: &Path, base_dir: &Path) -> Result<Self, ConfigErrors> {
        let raw = raw::parse(text).map_err(|errors| ConfigErrors::new(path, text, errors))?;
        validate::validate(raw, base_dir).map_err(|errors| ConfigErrors::new(path, text, errors))
    }

    /// Whether a listener speaks TLS.
    pub fn has_tls(&self) -> bool {
        self.listeners.iter().any(|listener| listener.tls.is_some())
    }

    /// Whether a table is spooled.
    pub fn has_spool(&self) -> bool {
        self.tables.iter().any(|table| table.spooled)
    }

    /// Streams of HTTP/2 that a core may serve at a time; none where no listener speaks it.
    pub fn http2_streams_max(&self) -> usize {
        match self.listeners.iter().any(|listener| listener.http2) {
            true => self.http2.connections * self.http2.streams,
            false => 0,
        }
    }

    /// Requests that a core may have at a time: one per connection, or one per stream.
    pub fn requests_max(&self) -> usize {
        self.limits.connections + self.http2_streams_max()
    }

    /// Segments that the spool has room for; none where no table is spooled.
    pub fn segment_count(&self) -> usize {
        if self.has_spool() {
            (self.spool.size / segment_size(self.upload.buffer_size) as u64) as usize
        } else {
            0
        }
    }

    /// Batches whose delivery a core may want to hear of at a time: as many as the spool holds, where a route promises
    /// delivery.
    pub fn reported_max(&self) -> usize {
        if self.tables.iter().any(|table| table.delivered) {
            self.segment_count()
        } else {
            0
        }
    }

    /// What is valid but likely not meant, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let table_count = self.tables.len();
        let buffer_count = self.upload.buffer_count;
        if table_count + 1 > buffer_count {
            warnings.push(format!(
                "{table_count} tables share {buffer_count} upload buffers per core: each table \
                 keeps one open and one more must be free while another is written, so a core \
                 seals buffers early (small blobs) or makes requests wait; set \
                 upload.buffer_count to {} or more",
                table_count + 1
            ));
        }
        let asks_for_certificates = |listener: &Listener| {
            let tls = listener.tls.as_ref();
            tls.is_some_and(|tls| tls.client.is_some())
        };
        let is_certificate =
            |principal: &Principal| matches!(principal.credential, Credential::Certificate(_));
        if self.principals.iter().any(is_certificate)
            && !self.listeners.iter().any(asks_for_certificates)
        {
            warnings.push(
                "no listener asks for the certificates of principals; set client_ca in listener.tls"
                    .into(),
            );
        }
        if self.http2_streams_max() == 0 && self.http2 != Self::default().http2 {
            warnings.push(
                "[http2] is for listeners with http2 = true, and there is none; set it where HTTP/2 is wanted"
                    .into(),
            );
        }
        let is_kusto = matches!(self.destination, Destination::Kusto(_));
        let is_plain = |table: &Table| table.mapping.is_none() && table.dedup == Dedup::Off;
        if !is_kusto && !self.tables.iter().all(is_plain) {
            warnings.push(
                "route.mapping and route.dedup are for destination.type = \"kusto\"; this \
                 destination does not use them"
                    .into(),
            );
        }
        warnings
    }
}
