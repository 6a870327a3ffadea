//! The memory sum: what this configuration holds, term by term, before anything is allocated.
//!
//! Comes after `config.rs`; `weir plan` prints it, and `weir run` refuses to start when it is
//! above the machine's limit (`budget/machine.rs` reads that).
//! Main thread, before the reactors; it allocates the list of terms.
//!
//! ```text
//! per core = Σ slab classes + upload buffers + deflate states + frame buffer + connections + HTTP/2
//!          + JSON scratch + staging + deliveries awaited + ring + reactor
//! process  = cores × per core + uplink in flight + spool + control
//! ```
//!
//! Invariant: whatever weir holds for longer than a call is in one of the terms.
//! A new holder of memory starts with a line in [`Budget::new`].
//!
//! Not here: the sizes that are measured or fixed (`limits.rs`), and the allocations themselves.

pub mod machine;

use crate::config::{Config, Destination, Registered, Size};
use crate::error::Fatal;
use crate::limits::{
    CONNECTION_STATE_SIZE, CONTROL_SIZE, DEFLATE_STATE_SIZE, DELIVERY_RESTING_MAX,
    DELIVERY_STATE_SIZE, FRAME_BUFFER_SIZE, HEAD_SIZE_MAX, HTTP2_CONNECTION_STATE_SIZE,
    HTTP2_STREAM_STATE_SIZE, JSON_SCRATCH_FIXED_SIZE, KUSTO_CLIENT_SIZE, KUSTO_TRANSFER_SIZE,
    REACTOR_RUNTIME_SIZE, REPORT_STATE_SIZE, RING_ENTRY_COUNT, RING_ENTRY_SIZE, SEGMENT_STATE_SIZE,
    STAGING_SIZE, TLS_CONNECTION_STATE_SIZE, TLS_OPEN_SIZE, UPLINK_TRANSFER_SIZE,
    http2_connection_window_size,
};
use machine::Machine;

/// Who holds a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Once per core.
    Core,
    /// Once.
    Process,
}

/// One line of the sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    pub name: String,
    pub scope: Scope,
    pub count: u64,
    /// Bytes of each.
    pub unit_size: u64,
    /// What holds it.
    pub holder: &'static str,
    /// The key that changes it, where there is one.
    pub key: Option<&'static str>,
}

impl Term {
    /// Bytes of all units, in one scope.
    pub fn size(&self) -> u64 {
        self.count * self.unit_size
    }
}

/// The sum for one configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Budget {
    pub cores: u64,
    /// The cores' terms first, then the process's.
    pub terms: Vec<Term>,
    /// What was asked for and what it means: `slabs.registered`.
    registered: Registered,
    slab_size: u64,
    descriptor_count: u64,
}

impl Budget {
    pub fn new(config: &Config) -> Self {
        let mut budget = Self {
            cores: config.cores as u64,
            terms: Vec::new(),
            registered: config.slabs.registered,
            slab_size: (config.cores * config.slabs.size()) as u64,
            descriptor_count: (config.cores * config.limits.connections) as u64,
        };
        budget.core_terms(config);
        budget.process_terms(config);
        budget
    }

    fn core_terms(&mut self, config: &Config) {
        for class in &config.slabs.classes {
            self.terms.push(Term {
                name: format!("slabs of {}", Size(class.size as u64)),
                scope: Scope::Core,
                count: class.count as u64,
                unit_size: class.size as u64,
                holder: "one request each, from its first byte to its reply",
                key: Some("slabs.classes"),
            });
        }
        self.core(
            "upload buffers",
            config.upload.buffer_count,
            config.upload.buffer_size,
            "compressed rows, until the blob is written",
            Some("upload.buffer_count and upload.buffer_size"),
        );
        self.core(
            "deflate states",
            config.upload.buffer_count,
            DEFLATE_STATE_SIZE,
            "window and tables of each upload buffer's encoder",
            Some("upload.buffer_count"),
        );
        if config.has_spool() {
            self.core(
                "frame buffer",
                1,
                FRAME_BUFFER_SIZE,
                "the frame of a group commit while it is written",
                None,
            );
        }
        if config.reported_max() > 0 {
            self.core(
                "deliveries awaited",
                config.reported_max(),
                REPORT_STATE_SIZE,
                "what is known of each batch whose delivery somebody may wait for",
                Some("spool.size"),
            );
        }
        self.core(
            "connections",
            config.limits.connections,
            CONNECTION_STATE_SIZE,
            "task and parser state of each open connection, idle ones too",
            Some("limits.connections"),
        );
        self.http2_terms(config);
        if config.has_tls() {
            self.core(
                "TLS connections",
                config.limits.connections,
                TLS_CONNECTION_STATE_SIZE,
                "keys, certificates and ciphertext to be sent of each TLS connection",
                Some("limits.connections"),
            );
            self.core(
                "TLS records",
                1,
                TLS_OPEN_SIZE,
                "the records that are being opened, and the messages of one handshake",
                None,
            );
        }
        self.core(
            "JSON scratch",
            1,
            config.slabs.size_max().div_ceil(8) + JSON_SCRATCH_FIXED_SIZE,
            "one bit per byte of the largest slab, and the checker's stack",
            Some("slabs.classes"),
        );
        self.core(
            "staging",
            1,
            STAGING_SIZE,
            "the row and the reply being put together",
            None,
        );
        self.core(
            "ring entries",
            RING_ENTRY_COUNT,
            RING_ENTRY_SIZE,
            "submissions and completions shared with the kernel",
            None,
        );
        self.core(
            "reactor",
            1,
            REACTOR_RUNTIME_SIZE,
            "stack, runtime and table of operations in flight",
            None,
        );
    }

    fn http2_terms(&mut self, config: &Config) {
        let streams = config.http2_streams_max();
        if streams == 0 {
            return;
        }
        self.core(
            "HTTP/2 windows",
            config.http2.connections,
            http2_connection_window_size(config.http2.streams, config.http2.window),
            "what may be in flight to all streams of a connection, before a slab has it",
            Some("http2.connections, http2.streams and http2.window"),
        );
        self.core(
            "HTTP/2 connections",
            config.http2.connections,
            HTTP2_CONNECTION_STATE_SIZE,
            "buffers and tables of each connection",
            Some("http2.connections"),
        );
        self.core(
            "HTTP/2 streams",
            streams,
            HTTP2_STREAM_STATE_SIZE,
            "task, header fields and answer of each stream",
            Some("http2.connections and http2.streams"),
        );
        self.core(
            "HTTP/2 head",
            1,
            HEAD_SIZE_MAX,
            "the head that is being judged",
            None,
        );
    }

    fn process_terms(&mut self, config: &Config) {
        if matches!(config.destination, Destination::Kusto(_)) {
            self.terms.push(Term {
                name: "uplink in flight".into(),
                scope: Scope::Process,
                count: config.uplink.concurrency as u64,
                unit_size: KUSTO_TRANSFER_SIZE as u64,
                holder: "pieces of a segment, a connection, and the message of a blob on its way",
                key: Some("uplink.concurrency"),
            });
            self.process(
                "uplink at rest",
                DELIVERY_RESTING_MAX,
                DELIVERY_STATE_SIZE,
                "what is known of a delivery that failed, until it is tried again",
            );
            self.process(
                "Kusto client",
                1,
                KUSTO_CLIENT_SIZE,
                "answers, resources, certificates and connections",
            );
        } else {
            self.process(
                "uplink in flight",
                self.cores as usize,
                UPLINK_TRANSFER_SIZE,
                "a window on a segment, and the state of the batch being delivered",
            );
        }
        if config.has_spool() {
            self.process(
                "spool segments",
                config.segment_count(),
                SEGMENT_STATE_SIZE,
                "what is known of each segment",
            );
            self.process(
                "recovery",
                1,
                FRAME_BUFFER_SIZE,
                "a window on a segment that an earlier run left",
            );
        }
        self.process(
            "control",
            1,
            CONTROL_SIZE,
            "program, allocator, uplink runtime, metrics and admin",
        );
    }

    fn core(
        &mut self,
        name: &str,
        count: usize,
        unit_size: usize,
        holder: &'static str,
        key: Option<&'static str>,
    ) {
        self.terms.push(Term {
            name: name.into(),
            scope: Scope::Core,
            count: count as u64,
            unit_size: unit_size as u64,
            holder,
            key,
        });
    }

    fn process(&mut self, name: &str, count: usize, unit_size: usize, holder: &'static str) {
        self.terms.push(Term {
            name: name.into(),
            scope: Scope::Process,
            count: count as u64,
            unit_size: unit_size as u64,
            holder,
            key: None,
        });
    }

    /// Bytes that each core holds.
    pub fn core_size(&self) -> u64 {
        self.scope_size(Scope::Core)
    }

    /// Bytes that the process holds, all cores included.
    pub fn total_size(&self) -> u64 {
        self.cores * self.core_size() + self.scope_size(Scope::Process)
    }

    fn scope_size(&self, scope: Scope) -> u64 {
        self.terms
            .iter()
            .filter(|term| term.scope == scope)
            .map(Term::size)
            .sum()
    }

    /// Holds the sum against the machine's limit.
    pub fn verify(&self, config: &Config, machine: &Machine) -> Result<(), Fatal> {
        let Some(limit) = machine.memory_limit(config) else {
            return Ok(());
        };
        let sum = self.total_size();
        if sum <= limit.size {
            return Ok(());
        }
        Err(Fatal::BudgetExceeded {
            sum,
            limit: limit.size,
            limit_origin: limit.origin.clone(),
            largest: self.largest(),
        })
    }

    /// The three largest terms that a key changes, and the keys.
    fn largest(&self) -> String {
        let mut terms: Vec<(u64, &Term, &str)> = self
            .terms
            .iter()
            .filter_map(|term| {
                let cores = match term.scope {
                    Scope::Core => self.cores,
                    Scope::Process => 1,
                };
                term.key.map(|key| (cores * term.size(), term, key))
            })
            .collect();
        terms.sort_by_key(|(size, ..)| std::cmp::Reverse(*size));
        terms.truncate(3);
        let mut largest: Vec<String> = terms
            .into_iter()
            .map(|(size, term, key)| format!("{} {:.2} ({key})", term.name, Size(size)))
            .collect();
        if self.cores > 1 {
            largest.push(format!("or the {} cores (cores)", self.cores));
        }
        largest.join(", ")
    }

    /// Whether the kernel will likely register the slabs, and if not, why and what to change.
    pub fn registration(&self, machine: &Machine) -> Registration {
        if self.registered == Registered::Never {
            return Registration::Unwanted;
        }
        match machine.memlock_limit {
            // The kernel counts the pinned pages of all of this user's rings together.
            Some(limit) if limit < self.slab_size && !machine.may_lock_memory => {
                Registration::MemlockTooLow {
                    limit,
                    slab_size: self.slab_size,
                }
            }
            _ => Registration::Expected,
        }
    }

    /// What is valid but likely not meant on this machine, one sentence each.
    /// Slabs that won't be registered, where that is allowed, are no warning of the plan, which has
    /// a line for it.
    pub fn warnings(&self, config: &Config, machine: &Machine) -> Vec<String> {
        let mut warnings = config.warnings();
        let registration = self.registration(machine);
        if self.registered == Registered::Require && registration != Registration::Expected {
            warnings.push(format!(
                "slabs.registered is \"require\", so weir will not start here; slabs would be \
                 {registration}"
            ));
        }
        if let Some(limit) = machine.descriptor_limit
            && limit < self.descriptor_count
        {
            warnings.push(format!(
                "{} connections are allowed, but this process may open {limit} files at most; \
                 raise the limit (ulimit -Hn) or reduce limits.connections",
                self.descriptor_count
            ));
        }
        warnings
    }
}

/// What to expect of the slabs' registration. Only the start itself tells for sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    Expected,
    /// `slabs.registered = "never"`.
    Unwanted,
    MemlockTooLow {
        limit: u64,
        /// Bytes of all cores' slabs.
        slab_size: u64,
    },
}

impl std::fmt::Display for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Expected => write!(f, "registered"),
            Self::Unwanted => write!(f, "unregistered: slabs.registered is \"never\""),
            Self::MemlockTooLow { limit, slab_size } => write!(
                f,
                "unregistered: the memlock limit is {:.2}, slabs need {:.2}; same slabs, same bounds; \
                 to register them: ulimit -l {}",
                Size(*limit),
                Size(*slab_size),
                // The shell counts in KiB.
                slab_size.div_ceil(1024)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SlabClass;
    use crate::limits::{CORE_SIZE_DEFAULT_MAX, GIB, KIB, MIB};
    use machine::MemoryLimit;

    fn unlimited() -> Machine {
        Machine {
            cgroup_limit: None,
            memlock_limit: None,
            may_lock_memory: false,
            descriptor_limit: None,
        }
    }

    #[test]
    fn a_core_fits_in_its_share_by_default() {
        let budget = Budget::new(&Config::default());
        assert!(
            budget.core_size() <= CORE_SIZE_DEFAULT_MAX,
            "{:.2}",
            Size(budget.core_size())
        );
        // 1 MiB + 8 MiB + 32 MiB, as designed.
        assert_eq!(budget.slab_size, 41 * MIB as u64);
    }

    #[test]
    fn the_sum_follows_each_key() {
        let default = Config::default();
        let grown = |change: fn(&mut Config)| {
            let mut config = default.clone();
            change(&mut config);
            let budget = Budget::new(&config);
            budget.total_size() - Budget::new(&default).total_size()
        };
        assert_eq!(grown(|_| ()), 0);
        assert_eq!(
            grown(|config| config.slabs.classes[0].count += 1),
            16 * KIB as u64
        );
        assert_eq!(
            grown(|config| config.upload.buffer_count += 1),
            (4 * MIB + DEFLATE_STATE_SIZE) as u64
        );
        assert_eq!(
            grown(|config| config.limits.connections += 1),
            CONNECTION_STATE_SIZE as u64
        );
        // A new largest class grows the scratch as well.
        assert_eq!(
            grown(|config| config.slabs.classes.push(SlabClass {
                size: 16 * MIB,
                count: 1
            })),
            (16 * MIB + MIB) as u64
        );
        assert_eq!(
            grown(|config| config.cores += 1),
            Budget::new(&default).core_size() + UPLINK_TRANSFER_SIZE as u64
        );
    }

    #[test]
    fn tls_is_paid_for_where_a_listener_speaks_it() {
        let parse = |text: &str| Config::parse(text, "t".as_ref(), "".as_ref()).unwrap();
        let size = |text: &str| Budget::new(&parse(text)).core_size();
        let listener = "[[listener]]\naddress = \"[::1]:0\"\n";
        let tls = "tls = { certificate = \"c\", key = \"k\" }\n";
        assert_eq!(size(listener), Budget::new(&Config::default()).core_size());
        let more = size(&format!("{listener}{tls}[limits]\nconnections = 10\n"))
            - size("[limits]\nconnections = 10\n");
        assert_eq!(
            more,
            (10 * TLS_CONNECTION_STATE_SIZE + TLS_OPEN_SIZE) as u64
        );
    }

    #[test]
    fn http2_is_in_the_sum_where_a_listener_speaks_it() {
        let mut config = Config::default();
        let before = Budget::new(&config).core_size();
        config.http2.connections = 3;
        config.http2.streams = 10;
        config.http2.window = 64 * KIB;
        assert_eq!(Budget::new(&config).core_size(), before);
        config.listeners[0].http2 = true;
        let streams = 3 * 10 * HTTP2_STREAM_STATE_SIZE;
        let connections = 3 * (HTTP2_CONNECTION_STATE_SIZE + 10 * 64 * KIB);
        assert_eq!(
            Budget::new(&config).core_size() - before,
            (streams + connections + HEAD_SIZE_MAX) as u64
        );
        // A connection has the window that RFC 9113 gives it, however little is configured.
        config.http2.streams = 1;
        config.http2.window = 16 * KIB;
        let terms = Budget::new(&config).terms;
        let windows = terms.iter().find(|term| term.name == "HTTP/2 windows");
        assert_eq!(windows.unwrap().unit_size, 65_535);
    }

    #[test]
    fn kusto_holds_what_is_on_its_way_whatever_the_cores() {
        let kusto = "[destination]\ntype = \"kusto\"\ningest_uri = \"https://ingest-c.westeurope.kusto.windows.net\"\n\
                     identity = { azure_cli = {} }\n";
        let parse = |text: &str| Config::parse(text, "t".as_ref(), "".as_ref()).unwrap();
        let sum = |text: &str| Budget::new(&parse(&format!("{kusto}{text}"))).total_size();
        let more = sum("[uplink]\nconcurrency = 6\n") - sum("");
        assert_eq!(more, 2 * KUSTO_TRANSFER_SIZE as u64);
        let directory = Budget::new(&Config::default()).total_size();
        let client = 4 * KUSTO_TRANSFER_SIZE
            + DELIVERY_RESTING_MAX * DELIVERY_STATE_SIZE
            + KUSTO_CLIENT_SIZE;
        assert_eq!(
            sum("") + UPLINK_TRANSFER_SIZE as u64 - directory,
            client as u64
        );
    }

    #[test]
    fn the_smaller_limit_counts_and_is_named() {
        let mut config = Config::default();
        let budget = Budget::new(&config);
        let mut machine = unlimited();
        assert!(budget.verify(&config, &machine).is_ok());

        machine.cgroup_limit = Some(MemoryLimit {
            size: budget.total_size(),
            origin: "control group".into(),
        });
        assert!(budget.verify(&config, &machine).is_ok());

        config.memory.limit = Some(budget.total_size() - 1);
        let message = budget.verify(&config, &machine).unwrap_err().to_string();
        for part in [
            "(memory.limit)",
            "slabs of 8MiB 32MiB",
            "upload.buffer_count",
        ] {
            assert!(message.contains(part), "{message}");
        }

        config.memory.limit = Some(GIB as u64);
        machine.cgroup_limit.as_mut().unwrap().size = MIB as u64;
        let message = budget.verify(&config, &machine).unwrap_err().to_string();
        assert!(
            message.contains("limit of 1MiB (control group)"),
            "{message}"
        );
    }

    #[test]
    fn registration_follows_memlock_and_the_capability() {
        let mut config = Config::default();
        let mut machine = unlimited();
        machine.memlock_limit = Some(8 * MIB as u64);
        let budget = Budget::new(&config);
        let expected = budget.registration(&machine).to_string();
        assert!(expected.contains("memlock limit is 8MiB, slabs need 41MiB"));
        assert!(expected.ends_with("ulimit -l 41984"), "{expected}");
        assert!(budget.warnings(&config, &machine).is_empty());
        config.slabs.registered = Registered::Require;
        let warnings = Budget::new(&config).warnings(&config, &machine);
        assert!(warnings[0].contains("will not start"), "{warnings:?}");
        config.slabs.registered = Registered::Prefer;

        machine.may_lock_memory = true;
        assert_eq!(budget.registration(&machine), Registration::Expected);
        machine.descriptor_limit = Some(1024);
        assert!(budget.warnings(&config, &machine).is_empty());
        machine.descriptor_limit = Some(1023);
        assert_eq!(budget.warnings(&config, &machine).len(), 1);

        machine.may_lock_memory = false;
        machine.memlock_limit = Some(41 * MIB as u64);
        assert_eq!(budget.registration(&machine), Registration::Expected);
        // Two cores need twice as much.
        config.cores = 2;
        assert!(matches!(
            Budget::new(&config).registration(&machine),
            Registration::MemlockTooLow { .. }
        ));
        config.slabs.registered = Registered::Never;
        assert_eq!(
            Budget::new(&config).registration(&machine),
            Registration::Unwanted
        );
    }
}
