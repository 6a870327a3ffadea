//! What the values must satisfy; makes the [`Config`] out of the file's shape.
//!
//! All errors are collected, so that one run of `weir check` shows them all.
//! A value that is wrong is replaced by its default while the rest is checked;
//! with an error noted, no `Config` comes out, so the stand-in is never seen.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;

use super::error::{Placed, list, nearest};
use super::raw::{
    Key, RawConfig, RawCores, RawDeadLetter, RawDeadlines, RawDestination, RawDuration, RawHttp2,
    RawListener, RawListenerTls, RawRoute, RawSize, RawSlabClass, RawSpool, TableOf,
};
use super::{
    Ack, Admin, Batch, ClientAuth, Compression, Config, DeadLetter, Deadlines, Dedup, Destination,
    Envelope, Http2, Limits, Listener, ListenerTls, Memory, PathPattern, Principal, Registered,
    Response, Route, Size, SlabClass, Slabs, Spool, SuccessStatus, Table, Uplink, Upload,
};
use crate::limits::{
    COMPRESSION_LEVEL_MAX, COMPRESSION_LEVEL_MIN, CONNECTION_COUNT_MAX, CORE_COUNT_MAX,
    DEAD_LETTER_AGE_MAX, DURATION_MAX, ENTITY_NAME_SIZE_MAX, FILE_NAME_SIZE_MAX, GIB,
    HTTP2_CONNECTION_COUNT_MAX, HTTP2_STREAM_COUNT_MAX, HTTP2_WINDOW_SIZE_MAX,
    HTTP2_WINDOW_SIZE_MIN, LISTENER_COUNT_MAX, MEMORY_LIMIT_MIN, PAGE_SIZE, RECORD_SIZE_MAX,
    REQUEST_LINE_SIZE_MAX, ROUTE_COUNT_MAX, SEGMENT_COUNT_MAX, SEGMENT_COUNT_MIN,
    SLAB_CLASS_COUNT_MAX, SLAB_COUNT_MAX, SLAB_SIZE_MAX, SLAB_SIZE_MIN, TAG_SIZE_MAX,
    TLS_SLAB_SIZE_MIN, UPLINK_CONCURRENCY_MAX, UPLOAD_BUFFER_COUNT_MAX, UPLOAD_BUFFER_COUNT_MIN,
    UPLOAD_BUFFER_SIZE_MAX, segment_size, upload_buffer_size_min,
};

pub(super) fn validate(raw: RawConfig, base_dir: &Path) -> Result<Config, Vec<Placed>> {
    let mut check = Check::default();
    let config = check.config(raw, base_dir);
    if check.errors.is_empty() {
        Ok(config)
    } else {
        Err(check.errors)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Directory,
    Null,
    Kusto,
}

/// The errors so far. Each method checks one part and notes what is wrong with it.
#[derive(Default)]
pub(super) struct Check {
    errors: Vec<Placed>,
}

impl Check {
    fn config(&mut self, raw: RawConfig, base_dir: &Path) -> Config {
        let default = Config::default();
        let destination = self.destination(raw.destination.0, default.destination, base_dir);
        let is_directory = matches!(destination, Destination::Directory { .. });
        let principals = self.principals(raw.principal, base_dir);
        let (routes, tables) = match raw.route {
            Some(routes) => self.routes(routes, is_directory, &principals),
            None => (default.routes, default.tables),
        };
        let slabs = Slabs {
            registered: self.choice(
                raw.slabs.0.registered,
                &[
                    ("prefer", Registered::Prefer),
                    ("require", Registered::Require),
                    ("never", Registered::Never),
                ],
                default.slabs.registered,
            ),
            classes: match raw.slabs.0.classes {
                Some(classes) => self.slab_classes(classes),
                None => default.slabs.classes,
            },
        };
        let (upload, record) = self.upload_and_record(
            raw.upload.0.buffer_count,
            raw.upload.0.buffer_size,
            raw.limits.0.record,
            default.upload,
            default.limits.record,
        );
        let cores = self.cores(raw.cores, default.cores);
        let spool = self.spool(raw.spool.0, default.spool, base_dir, cores, &upload);
        Config {
            cores,
            listeners: match raw.listener {
                Some(listeners) => self.listeners(
                    listeners,
                    default.listeners,
                    &principals,
                    base_dir,
                    slabs.classes.last().map_or(0, |class| class.size),
                ),
                None => default.listeners,
            },
            admin: Admin {
                address: self.address(raw.admin.0.address, default.admin.address),
            },
            destination,
            spool,
            uplink: Uplink {
                concurrency: self.integer(
                    raw.uplink.0.concurrency,
                    default.uplink.concurrency,
                    1..=UPLINK_CONCURRENCY_MAX,
                ),
            },
            dead_letter: self.dead_letter(raw.dead_letter.0, default.dead_letter, base_dir),
            batch: Batch {
                max_age: self.duration(raw.batch.0.max_age, default.batch.max_age),
            },
            compression: Compression {
                level: self.integer(
                    raw.compression.0.level,
                    default.compression.level.into(),
                    COMPRESSION_LEVEL_MIN.into()..=COMPRESSION_LEVEL_MAX.into(),
                ) as u8,
            },
            response: Response {
                status: self.status(raw.response.0.status, default.response.status),
            },
            slabs,
            upload,
            limits: Limits {
                wait: self.duration(raw.limits.0.wait, default.limits.wait),
                connections: self.integer(
                    raw.limits.0.connections,
                    default.limits.connections,
                    1..=CONNECTION_COUNT_MAX,
                ),
                connections_per_address: self.integer(
                    raw.limits.0.connections_per_address,
                    default.limits.connections_per_address,
                    1..=CONNECTION_COUNT_MAX,
                ),
                requests_per_connection: self.integer(
                    raw.limits.0.requests_per_connection,
                    default.limits.requests_per_connection as usize,
                    1..=usize::MAX,
                ) as u64,
                record,
                ack: self.duration(raw.limits.0.ack, default.limits.ack),
                drain: self.duration(raw.limits.0.drain, default.limits.drain),
            },
            deadlines: self.deadlines(raw.deadlines.0, default.deadlines),
            http2: self.http2(raw.http2.0, default.http2),
            memory: Memory {
                limit: raw
                    .memory
                    .0
                    .limit
                    .map(|limit| self.size(&limit, MEMORY_LIMIT_MIN..=u64::MAX)),
            },
            principals,
            routes,
            tables,
        }
    }

    pub(super) fn error(&mut self, span: Range<usize>, message: impl Into<String>) {
        self.errors.push(Placed {
            span,
            message: message.into(),
        });
    }

    // --- single values ------------------------------------------------------------------------

    pub(super) fn integer(
        &mut self,
        key: Key<i64>,
        default: usize,
        bounds: RangeInclusive<usize>,
    ) -> usize {
        let Some(value) = key else { return default };
        match usize::try_from(*value.get_ref()) {
            Ok(integer) if bounds.contains(&integer) => integer,
            _ => {
                let message = format!(
                    "{} is out of bounds; use {} to {}",
                    value.get_ref(),
                    bounds.start(),
                    bounds.end()
                );
                self.error(value.span(), message);
                // In bounds, so that sums over it stay in bounds too.
                *bounds.start()
            }
        }
    }

    pub(super) fn size(&mut self, value: &Spanned<RawSize>, bounds: RangeInclusive<u64>) -> u64 {
        let read = match value.get_ref() {
            RawSize::Bytes(bytes) => u64::try_from(*bytes)
                .map_err(|_| format!("{bytes} bytes is not a size; use a positive number")),
            RawSize::Text(text) => Size::parse(text)
                .map(|size| size.0)
                .map_err(|invalid| format!("\"{text}\" is {invalid}")),
        };
        let checked = read.and_then(|size| {
            if bounds.contains(&size) {
                Ok(size)
            } else if size < *bounds.start() {
                let least = Size(*bounds.start());
                Err(format!("{} is too small; use {least} or more", Size(size)))
            } else {
                let most = Size(*bounds.end());
                Err(format!("{} is too large; use {most} or less", Size(size)))
            }
        });
        checked.unwrap_or_else(|message| {
            self.error(value.span(), message);
            *bounds.start()
        })
    }

    pub(super) fn duration(&mut self, key: Key<RawDuration>, default: Duration) -> Duration {
        let Some(value) = key else { return default };
        self.duration_up_to(value, DURATION_MAX)
    }

    fn duration_up_to(&mut self, value: Spanned<RawDuration>, most: Duration) -> Duration {
        let RawDuration::Text(text) = value.get_ref();
        let message = match humantime::parse_duration(text) {
            Ok(duration) if duration.is_zero() => "must be longer than nothing".into(),
            Ok(duration) if duration <= most => return duration,
            Ok(_) => format!(
                "\"{text}\" is too long; use {} or less",
                humantime::format_duration(most)
            ),
            Err(_) => format!(
                "\"{text}\" is not a duration; write a number and a unit, such as \"10s\", \
                 \"500ms\" or \"2m\""
            ),
        };
        self.error(value.span(), message);
        most
    }

    fn deadlines(&mut self, raw: RawDeadlines, default: Deadlines) -> Deadlines {
        Deadlines {
            handshake: self.duration(raw.handshake, default.handshake),
            head: self.duration(raw.head, default.head),
            body_start: self.duration(raw.body_start, default.body_start),
            body: self.duration(raw.body, default.body),
            body_rate: raw.body_rate.map_or(default.body_rate, |rate| {
                self.size(&rate, 1..=GIB as u64) as usize
            }),
            body_rate_window: self.duration(raw.body_rate_window, default.body_rate_window),
            contended: self.duration(raw.contended, default.contended),
            write: self.duration(raw.write, default.write),
            idle: self.duration(raw.idle, default.idle),
        }
    }

    fn http2(&mut self, raw: RawHttp2, default: Http2) -> Http2 {
        Http2 {
            connections: self.integer(
                raw.connections,
                default.connections,
                1..=HTTP2_CONNECTION_COUNT_MAX,
            ),
            streams: self.integer(raw.streams, default.streams, 1..=HTTP2_STREAM_COUNT_MAX),
            window: raw.window.map_or(default.window, |window| {
                let bounds = HTTP2_WINDOW_SIZE_MIN as u64..=HTTP2_WINDOW_SIZE_MAX as u64;
                self.size(&window, bounds) as usize
            }),
        }
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        key: Key<String>,
        choices: &[(&str, T)],
        default: T,
    ) -> T {
        let Some(value) = key else { return default };
        let text = value.get_ref();
        if let Some((_, choice)) = choices.iter().find(|(name, _)| name == text) {
            return *choice;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        let message = match nearest(text, &names) {
            Some(name) => format!("unknown value `{text}`; did you mean `{name}`?"),
            None => format!("unknown value `{text}`; use {}", list(&names)),
        };
        self.error(value.span(), message);
        default
    }

    fn address(&mut self, key: Key<String>, default: SocketAddr) -> SocketAddr {
        let Some(value) = key else { return default };
        let text = value.get_ref();
        text.parse().unwrap_or_else(|_| {
            let message = format!(
                "\"{text}\" is not an address; write an IP address and a port, such as \
                 \"127.0.0.1:9880\" or \"[::]:9880\" (names are not looked up)"
            );
            self.error(value.span(), message);
            default
        })
    }

    fn status(&mut self, key: Key<i64>, default: SuccessStatus) -> SuccessStatus {
        let Some(value) = key else { return default };
        match *value.get_ref() {
            200 => SuccessStatus::Ok,
            201 => SuccessStatus::Created,
            204 => SuccessStatus::NoContent,
            other => {
                let message = format!(
                    "{other} does not say that a request was accepted; use 200, 201 or 204"
                );
                self.error(value.span(), message);
                default
            }
        }
    }

    // --- the machine --------------------------------------------------------------------------

    fn cores(&mut self, key: Key<RawCores>, default: usize) -> usize {
        let Some(value) = key else { return default };
        // Respects the CPU affinity and the control group's CPU quota.
        let available = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(CORE_COUNT_MAX);
        let message = match value.get_ref() {
            RawCores::Word(word) if word == "all" => return available,
            RawCores::Word(word) => match nearest(word, &["all"]) {
                Some(name) => format!("unknown value `{word}`; did you mean `{name}`?"),
                None => format!("unknown value `{word}`; use a number of cores or \"all\""),
            },
            RawCores::Count(count) => match usize::try_from(*count) {
                Ok(count) if (1..=available).contains(&count) => return count,
                _ => format!(
                    "{count} is out of bounds: this process may use {available} {}; use 1 to \
                     {available}, or \"all\"",
                    if available == 1 { "CPU" } else { "CPUs" }
                ),
            },
        };
        self.error(value.span(), message);
        default
    }

    fn listeners(
        &mut self,
        raw: Spanned<Vec<TableOf<RawListener>>>,
        default: Vec<Listener>,
        principals: &[Principal],
        base_dir: &Path,
        slab_size_max: usize,
    ) -> Vec<Listener> {
        let span = raw.span();
        let raw = raw.into_inner();
        if raw.is_empty() || raw.len() > LISTENER_COUNT_MAX {
            let message = format!(
                "{} listeners; configure 1 to {LISTENER_COUNT_MAX}",
                raw.len()
            );
            self.error(span, message);
            return default;
        }
        let mut listeners = Vec::with_capacity(raw.len());
        let mut seen = HashSet::new();
        for TableOf(listener) in raw {
            let address_span = listener
                .address
                .as_ref()
                .map_or(span.clone(), Spanned::span);
            let errors_before = self.errors.len();
            let address = self.address(listener.address, default[0].address);
            let is_valid = self.errors.len() == errors_before;
            let tls = match listener.tls {
                Some(tls) => self.listener_tls(tls, base_dir, slab_size_max),
                None => None,
            };
            if is_valid && address.port() != 0 && !seen.insert(address) {
                let message =
                    format!("{address} is listened on already; remove one of the two listeners");
                self.error(address_span, message);
            }
            listeners.push(Listener {
                address,
                principals: self.allowed_principals(listener.principals, principals),
                allow: self.networks(listener.allow),
                proxies: self.networks(listener.proxies),
                http2: listener.http2.is_some_and(Spanned::into_inner),
                tls,
            });
        }
        listeners
    }

    fn listener_tls(
        &mut self,
        raw: Spanned<TableOf<RawListenerTls>>,
        base_dir: &Path,
        slab_size_max: usize,
    ) -> Option<ListenerTls> {
        let span = raw.span();
        let TableOf(raw) = raw.into_inner();
        if slab_size_max < TLS_SLAB_SIZE_MIN {
            let message = format!(
                "TLS needs a slab class of {} or more: a head and a record",
                Size(TLS_SLAB_SIZE_MIN as u64)
            );
            self.error(span.clone(), message);
        }
        let (Some(certificate), Some(key)) = (raw.certificate, raw.key) else {
            self.error(
                span,
                "`tls` has a `certificate` and a `key`; add the missing one",
            );
            return None;
        };
        let certificate = self.file(certificate, base_dir);
        let key = self.file(key, base_dir);
        let ca = raw.client_ca.map(|path| self.file(path, base_dir));
        let crl = raw.client_crl.map(|path| self.file(path, base_dir));
        let has_auth = raw.client_auth.is_some();
        let optional = self.choice(
            raw.client_auth,
            &[("required", false), ("optional", true)],
            false,
        );
        let client = match ca {
            Some(ca) => Some(ClientAuth {
                ca: ca?,
                crl: crl.flatten(),
                optional,
            }),
            None => {
                if has_auth || crl.is_some() {
                    let message = "`client_crl` and `client_auth` are about what `client_ca` signed; add that, or remove them";
                    self.error(span, message);
                }
                None
            }
        };
        Some(ListenerTls {
            certificate: certificate?,
            key: key?,
            client,
        })
    }

    fn destination(
        &mut self,
        raw: RawDestination,
        default: Destination,
        base_dir: &Path,
    ) -> Destination {
        let kind = self.choice(
            raw.kind.clone(),
            &[
                ("directory", Kind::Directory),
                ("null", Kind::Null),
                ("kusto", Kind::Kusto),
            ],
            Kind::Directory,
        );
        match kind {
            Kind::Directory => self.no_kusto(&raw),
            Kind::Null => {
                self.no_kusto(&raw);
                return Destination::Null;
            }
            Kind::Kusto => {
                return self
                    .kusto(raw, base_dir)
                    .map_or(default, Destination::Kusto);
            }
        }
        let Destination::Directory { path } = default else {
            unreachable!("the default destination is a directory")
        };
        Destination::Directory {
            path: self.directory(raw.path, path, base_dir),
        }
    }

    fn directory(&mut self, key: Key<String>, default: PathBuf, base_dir: &Path) -> PathBuf {
        let path = match key {
            Some(value) if value.get_ref().is_empty() || value.get_ref().contains('\0') => {
                self.error(value.span(), "not a path; name a directory");
                default
            }
            Some(value) => value.into_inner().into(),
            None => default,
        };
        base_dir.join(path)
    }

    fn spool(
        &mut self,
        raw: RawSpool,
        default: Spool,
        base_dir: &Path,
        cores: usize,
        upload: &Upload,
    ) -> Spool {
        let segment_size = segment_size(upload.buffer_size) as u64;
        let count_min = (SEGMENT_COUNT_MIN * cores) as u64;
        let size = match &raw.size {
            Some(value) => {
                let errors_before = self.errors.len();
                let size = self.size(value, 1..=u64::MAX);
                let count = size / segment_size;
                if self.errors.len() == errors_before && count < count_min {
                    let message = format!(
                        "{} is room for {count} batches, and {cores} cores need {count_min}; use {} or more, or \
                         reduce upload.buffer_size",
                        Size(size),
                        Size(count_min * segment_size),
                    );
                    self.error(value.span(), message);
                } else if count > SEGMENT_COUNT_MAX as u64 {
                    let message = format!(
                        "{} is room for {count} batches, and weir keeps {SEGMENT_COUNT_MAX} at most; increase \
                         upload.buffer_size, or use {} or less",
                        Size(size),
                        Size(SEGMENT_COUNT_MAX as u64 * segment_size),
                    );
                    self.error(value.span(), message);
                }
                size
            }
            // Large buffers or many cores make it larger by themselves.
            None => default.size.max(2 * count_min * segment_size),
        };
        Spool {
            directory: self.directory(raw.directory, default.directory, base_dir),
            size,
        }
    }

    fn dead_letter(
        &mut self,
        raw: RawDeadLetter,
        default: DeadLetter,
        base_dir: &Path,
    ) -> DeadLetter {
        DeadLetter {
            directory: self.directory(raw.directory, default.directory, base_dir),
            size: match &raw.size {
                Some(value) => self.size(value, 1..=u64::MAX),
                None => default.size,
            },
            age: raw
                .age
                .map(|age| self.duration_up_to(age, DEAD_LETTER_AGE_MAX)),
        }
    }

    // --- memory -------------------------------------------------------------------------------

    fn slab_classes(
        &mut self,
        raw: Spanned<Vec<Spanned<TableOf<RawSlabClass>>>>,
    ) -> Vec<SlabClass> {
        let span = raw.span();
        let is_empty = raw.get_ref().is_empty();
        let mut classes: Vec<SlabClass> = Vec::new();
        // The largest valid one so far, so that one wrong size is one error.
        let mut size_before = 0;
        for class in raw.into_inner() {
            let class_span = class.span();
            let TableOf(class) = class.into_inner();
            let (Some(raw_size), Some(raw_count)) = (class.size, class.count) else {
                let message = "a slab class has a `size` and a `count`; add the missing one";
                self.error(class_span, message);
                continue;
            };
            let errors_before = self.errors.len();
            let size = self.size(&raw_size, SLAB_SIZE_MIN as u64..=SLAB_SIZE_MAX as u64) as usize;
            if !size.is_multiple_of(PAGE_SIZE) {
                let down = size - size % PAGE_SIZE;
                let message = format!(
                    "a slab is whole pages of {}; use {} or {}",
                    Size(PAGE_SIZE as u64),
                    Size(down as u64),
                    Size((down + PAGE_SIZE) as u64)
                );
                self.error(raw_size.span(), message);
            }
            let is_valid = self.errors.len() == errors_before;
            if is_valid && size <= size_before {
                let message = format!(
                    "{} does not follow {}; order the classes by ascending size, each size once",
                    Size(size as u64),
                    Size(size_before as u64)
                );
                self.error(raw_size.span(), message);
            } else if is_valid {
                size_before = size;
            }
            let count = self.integer(Some(raw_count), 1, 1..=SLAB_COUNT_MAX);
            classes.push(SlabClass { size, count });
        }
        let count: usize = classes.iter().map(|class| class.count).sum();
        if is_empty {
            self.error(span, "no slab class; configure at least one");
        } else if classes.len() > SLAB_CLASS_COUNT_MAX {
            let message = format!(
                "{} slab classes; use {SLAB_CLASS_COUNT_MAX} at most",
                classes.len()
            );
            self.error(span, message);
        } else if count > SLAB_COUNT_MAX {
            let message = format!(
                "the classes have {count} slabs together; the ring registers {SLAB_COUNT_MAX} at \
                 most, reduce the counts"
            );
            self.error(span, message);
        }
        classes
    }

    /// These two hang together: the largest record must fit an empty upload buffer.
    fn upload_and_record(
        &mut self,
        buffer_count: Key<i64>,
        buffer_size: Key<RawSize>,
        record: Key<RawSize>,
        upload_default: Upload,
        record_default: usize,
    ) -> (Upload, usize) {
        let errors_before = self.errors.len();
        let record_size = match &record {
            Some(value) => self.size(value, 1..=RECORD_SIZE_MAX as u64) as usize,
            None => record_default,
        };
        let upload = Upload {
            buffer_size: match &buffer_size {
                Some(value) => self.size(value, 1..=UPLOAD_BUFFER_SIZE_MAX as u64) as usize,
                None => upload_default.buffer_size,
            },
            buffer_count: self.integer(
                buffer_count,
                upload_default.buffer_count,
                UPLOAD_BUFFER_COUNT_MIN..=UPLOAD_BUFFER_COUNT_MAX,
            ),
        };
        let needed = upload_buffer_size_min(record_size);
        if self.errors.len() == errors_before && upload.buffer_size < needed {
            let span = buffer_size
                .as_ref()
                .or(record.as_ref())
                .map_or(0..0, Spanned::span);
            let message = format!(
                "an upload buffer of {} does not take a record of {} that compresses badly; set \
                 upload.buffer_size to {} or more, or reduce limits.record",
                Size(upload.buffer_size as u64),
                Size(record_size as u64),
                Size(needed.next_multiple_of(PAGE_SIZE) as u64),
            );
            self.error(span, message);
        }
        (upload, record_size)
    }

    // --- routes -------------------------------------------------------------------------------

    fn routes(
        &mut self,
        raw: Spanned<Vec<Spanned<TableOf<RawRoute>>>>,
        is_directory: bool,
        principals: &[Principal],
    ) -> (Vec<Route>, Vec<Table>) {
        let span = raw.span();
        let raw = raw.into_inner();
        if raw.is_empty() || raw.len() > ROUTE_COUNT_MAX {
            let message = format!("{} routes; configure 1 to {ROUTE_COUNT_MAX}", raw.len());
            self.error(span, message);
            return (Vec::new(), Vec::new());
        }
        let Config {
            routes: routes_default,
            tables: tables_default,
            ..
        } = Config::default();
        let (route_default, table_default) = (&routes_default[0], &tables_default[0]);
        let mut routes: Vec<Route> = Vec::with_capacity(raw.len());
        let mut tables: Vec<Table> = Vec::new();
        let mut seen = HashSet::new();
        for route in raw {
            let route_span = route.span();
            let TableOf(route) = route.into_inner();
            let path_span = route.path.as_ref().map_or(route_span, Spanned::span);
            let pattern = match route.path {
                Some(path) => self.pattern(&path),
                None => Some(route_default.pattern.clone()),
            };
            if let Some(pattern) = &pattern
                && !seen.insert(pattern.clone())
            {
                let message = "this path has a route already; remove one of the two";
                self.error(path_span, message);
            }
            let ack = self.choice(
                route.ack,
                &[
                    ("durable", Ack::Durable),
                    ("memory", Ack::Memory),
                    ("delivered", Ack::Delivered),
                ],
                route_default.ack,
            );
            let table = Table {
                database: self.entity(route.database, &table_default.database, is_directory),
                table: self.entity(route.table, &table_default.table, is_directory),
                mapping: route.mapping.map(|name| self.mapping(name)),
                dedup: self.choice(
                    route.dedup,
                    &[("off", Dedup::Off), ("ingest-by", Dedup::IngestBy)],
                    table_default.dedup,
                ),
                spooled: ack != Ack::Memory,
                delivered: ack == Ack::Delivered,
            };
            let table_index = tables
                .iter()
                .position(|known| {
                    // Whether delivery is promised is of the table, not of what its rows have in common.
                    let delivered = known.delivered;
                    *known
                        == Table {
                            delivered,
                            ..table.clone()
                        }
                })
                .unwrap_or_else(|| {
                    tables.push(table);
                    tables.len() - 1
                });
            tables[table_index].delivered |= ack == Ack::Delivered;
            routes.push(Route {
                pattern: pattern.unwrap_or_else(|| route_default.pattern.clone()),
                table_index,
                envelope: self.choice(
                    route.envelope,
                    &[
                        ("fluent-bit", Envelope::FluentBit),
                        ("none", Envelope::None),
                    ],
                    route_default.envelope,
                ),
                ack,
                default_tag: self.tag(route.default_tag, &route_default.default_tag),
                principals: self.allowed_principals(route.principals, principals),
                allow: self.networks(route.allow),
                rate: self.rate(route.rate),
            });
        }
        (routes, tables)
    }

    fn pattern(&mut self, path: &Spanned<String>) -> Option<PathPattern> {
        match pattern_parse(path.get_ref()) {
            Ok(pattern) => Some(pattern),
            Err(message) => {
                self.error(path.span(), message);
                None
            }
        }
    }

    /// A database's or table's name.
    /// Source: "Entity names" in the Kusto documentation; of its letters only ASCII's, and no
    /// leading dot and no `..`, since the name becomes a directory's.
    fn entity(&mut self, key: Key<String>, default: &str, is_directory: bool) -> String {
        let Some(value) = key else {
            return default.to_owned();
        };
        let name = value.get_ref();
        let size_max = if is_directory {
            FILE_NAME_SIZE_MAX
        } else {
            ENTITY_NAME_SIZE_MAX
        };
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_-. ".contains(c);
        let message = if name.is_empty() || name.len() > size_max {
            Some(format!(
                "a name has 1 to {size_max} characters, this has {}",
                name.chars().count()
            ))
        } else if let Some(c) = name.chars().find(|c| !is_allowed(*c)) {
            Some(format!(
                "{c:?} cannot be in a name; use letters, digits, `_`, `-`, `.` and spaces"
            ))
        } else if name.starts_with('.') || name.contains("..") {
            Some("a name cannot start with a dot or have two in a row".into())
        } else if name.starts_with(' ') || name.ends_with(' ') {
            Some("a name cannot start or end with a space".into())
        } else {
            None
        };
        if let Some(message) = message {
            self.error(value.span(), message);
        }
        value.into_inner()
    }

    /// A mapping's name. It goes into JSON and into commands, both of which escape it.
    fn mapping(&mut self, name: Spanned<String>) -> String {
        let size = name.get_ref().len();
        let has_control = name.get_ref().chars().any(char::is_control);
        if !(1..=ENTITY_NAME_SIZE_MAX).contains(&size) || has_control {
            let message = format!(
                "a mapping's name has 1 to {ENTITY_NAME_SIZE_MAX} bytes of printable characters; remove the \
                 key where there is no mapping"
            );
            self.error(name.span(), message);
        }
        name.into_inner()
    }

    fn tag(&mut self, key: Key<String>, default: &str) -> String {
        let Some(value) = key else {
            return default.to_owned();
        };
        let tag = value.get_ref();
        // The bytes that a tag made from a path can have, so none needs escaping.
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
        if tag.is_empty() || tag.len() > TAG_SIZE_MAX || !tag.chars().all(is_allowed) {
            let message =
                format!("a tag has 1 to {TAG_SIZE_MAX} letters, digits, `_` and `.`; change it");
            self.error(value.span(), message);
        }
        value.into_inner()
    }
}

/// Reads `/exact/path`, `/prefix/*` or `/*`.
///
/// Paths of requests are compared byte for byte, so what can't be in one is refused here:
/// the route would never match.
fn pattern_parse(path: &str) -> Result<PathPattern, String> {
    if !path.starts_with('/') {
        return Err(format!("a path starts with `/`; did you mean \"/{path}\"?"));
    }
    if path.len() > REQUEST_LINE_SIZE_MAX {
        return Err(format!(
            "longer than a request line; use {REQUEST_LINE_SIZE_MAX} bytes or less"
        ));
    }
    let (literal, is_prefix) = match path.strip_suffix("/*") {
        Some(_) => (&path[..path.len() - 1], true),
        None => (path, false),
    };
    if literal.contains('*') {
        return Err(
            "`*` stands for the end of a path; use it only as the last segment, \
                    such as \"/events/*\""
                .into(),
        );
    }
    // RFC 3986 §3.3: pchar = unreserved / pct-encoded / sub-delims / ":" / "@"
    let bytes = literal.as_bytes();
    for (index, c) in literal.char_indices() {
        let is_allowed = match c {
            '%' => {
                let digits = bytes.get(index + 1..index + 3);
                digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            }
            _ => c.is_ascii_alphanumeric() || "/-._~!$&'()+,;=:@".contains(c),
        };
        if !is_allowed {
            return Err(format!(
                "{c:?} cannot be in the path of a request like this; write the bytes of other \
                 characters as %XX, and no query"
            ));
        }
    }
    let inner = &literal[1..];
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    let is_odd = |segment: &str| matches!(segment, "" | "." | "..");
    if literal == "//" || (!inner.is_empty() && inner.split('/').any(is_odd)) {
        return Err("a path has no empty segment, no `.` and no `..`; remove it".into());
    }
    Ok(if is_prefix {
        PathPattern::Prefix(literal.into())
    } else {
        PathPattern::Exact(literal.into())
    })
}
