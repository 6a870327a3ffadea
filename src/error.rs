//! Errors, by who must act: [`Fatal`] is the machine's or the operator's, [`Reject`] the peer's, [`UploadError`] the
//! remote's.
//!
//! A `Fatal` ends the process. It is made where the cause is known, travels up unchanged,
//! and `main.rs` prints it once and exits with its code.
//! Its message says in one sentence what is wrong and what to change.
//! Main thread mostly; a reactor that can't start sends one to the main thread.
//!
//! A `Reject` is made on a reactor, allocates nothing, and becomes one reply (`http/reply.rs`).
//!
//! An `UploadError` is made on the uplink's runtime where the remote's answer is read, and says what to do with the
//! batch. It never holds a secret: no token, no signature, no URL's query.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::{ConfigErrors, Size};
use crate::limits::{HEAD_SIZE_MAX, HEADER_COUNT_MAX, KIB};
use crate::records::json::JsonError;

/// Why the process can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// One line per error, each `file:line:column: message`.
    #[error(transparent)]
    Config(#[from] ConfigErrors),

    #[error("cannot read the configuration {}: {source}; check the path given with --config", path.display())]
    ConfigUnreadable { path: PathBuf, source: io::Error },

    #[error(
        "the memory sum is {:.2}, above the limit of {:.2} ({limit_origin}); raise the limit or reduce \
         the largest terms: {largest}",
        Size(*sum), Size(*limit)
    )]
    BudgetExceeded {
        /// Bytes the configuration adds up to.
        sum: u64,
        /// Bytes allowed.
        limit: u64,
        /// Who set the limit.
        limit_origin: String,
        /// The terms that matter, with the keys that change them.
        largest: String,
    },

    #[error(
        "the kernel refuses io_uring ({source}); weir needs Linux 6.0 or later, the sysctl \
         kernel.io_uring_disabled at 0, and in a container a seccomp profile that allows \
         io_uring_setup, io_uring_enter and io_uring_register"
    )]
    IoUringRefused { source: io::Error },

    #[error(
        "the address {address} is already in use; stop the process that has it or change the \
         address in the configuration"
    )]
    PortTaken { address: SocketAddr },

    #[error("cannot listen on {address}: {source}; change the address in the configuration")]
    Bind {
        address: SocketAddr,
        source: io::Error,
    },

    #[error(
        "cannot write to the directory {}: {source}; create it writable for this user or change \
         destination.path", path.display()
    )]
    DirectoryNotWritable { path: PathBuf, source: io::Error },

    #[error(
        "slabs.registered = \"require\", but the kernel did not register {:.2} of slabs ({source}); \
         raise the memlock limit (ulimit -l {}, or LimitMEMLOCK= in systemd, or --ulimit memlock= \
         for a container) or set slabs.registered = \"prefer\"",
        Size(*size), size.div_ceil(1024)
    )]
    SlabsNotRegistered {
        /// Bytes of slabs of all cores.
        size: u64,
        source: io::Error,
    },

    #[error(
        "the memlock limit leaves no room for the ring ({source}); raise it (ulimit -l, \
         LimitMEMLOCK= in systemd, or --ulimit memlock= for a container)"
    )]
    RingRefused { source: io::Error },

    #[error(
        "cannot use the dead-letter directory {}: {source}; create it writable for this user or change \
         dead_letter.directory", path.display()
    )]
    DeadLetterUnusable { path: PathBuf, source: io::Error },

    #[error(
        "the dead-letter directory {} is in use by a running weir, which would not see the change; stop it first",
        path.display()
    )]
    DeadLetterLocked { path: PathBuf },

    #[error("no dead letter {name} in {}; `weir dead-letter ls` lists them", path.display())]
    NoDeadLetter { name: String, path: PathBuf },

    #[error("{failure_count} dead letters were not delivered and are kept; each says why above")]
    ReplayFailed { failure_count: usize },

    #[error("{failure_count} of the steps above failed; each says what to change")]
    OnlineCheck { failure_count: usize },

    #[error("a reactor panicked, its message is above; this is a bug in weir")]
    ReactorPanicked,

    #[error(
        "the spool {} is in use by another weir; stop that one, or give this one a spool.directory of its own",
        path.display()
    )]
    SpoolLocked { path: PathBuf },

    #[error(
        "cannot use the spool {}: {source}; create it writable for this user on a disk that is, or change \
         spool.directory", path.display()
    )]
    SpoolUnusable { path: PathBuf, source: io::Error },

    #[error(
        "the segment {} has format version {version}, and this weir reads versions {} to {}; deliver what it holds \
         with the weir that wrote it, or change spool.directory", path.display(), crate::spool::segment::VERSION_OLDEST,
        crate::spool::segment::VERSION
    )]
    SpoolVersion { path: PathBuf, version: u32 },

    #[error(
        "{damaged_count} segments are damaged; weir delivers what is whole of them and puts them aside, see above for \
         what is lost"
    )]
    SpoolDamaged { damaged_count: usize },

    #[error("no segment {segment} with a batch in {}; `weir spool ls` lists them", path.display())]
    NoSegment { segment: String, path: PathBuf },

    #[error(
        "{batches_undelivered} sealed batches that were in memory alone were not delivered within limits.drain and \
         are lost; the log above says why"
    )]
    Undelivered { batches_undelivered: usize },

    #[error("{action} failed: {source}")]
    Io {
        /// What was tried, as a noun: "starting the thread of core 3".
        action: String,
        source: io::Error,
    },
}

impl Fatal {
    /// Why `address` could not be bound.
    pub fn binding(address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::PortTaken { address },
            _ => Self::Bind { address, source },
        }
    }

    /// 2 for what the configuration must change, 1 for the machine.
    /// (clap exits with 2 as well when the arguments are wrong.)
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::ConfigUnreadable { .. } => 2,
            _ => 1,
        }
    }
}

const _: () = assert!(
    HEAD_SIZE_MAX == 16 * KIB && HEADER_COUNT_MAX == 64,
    "the details of the rejects name these numbers"
);

/// Why a request that was not the peer's fault is not acknowledged: 503. It can be sent again; what of it was stored
/// already may then be stored twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No free slab or upload buffer in time.
    Busy,
    /// The disk budget is spent.
    SpoolFull,
    /// The disk failed under the commit that covers the request, or has failed for good.
    StorageFault,
    /// Not delivered within `limits.ack`; the records are in the spool.
    AckTimeout,
    /// The destination will never take the batch; the records are with the dead letters.
    DeadLetter,
}

/// How a [`Refusal`] is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusalAnswer {
    /// The stable name in the body's `code` and in the metric's label.
    pub code: &'static str,
    /// One sentence for the sender.
    pub detail: &'static str,
    /// Seconds.
    pub retry_after: u8,
}

impl Refusal {
    pub const ALL: [Refusal; 5] = [
        Refusal::Busy,
        Refusal::SpoolFull,
        Refusal::StorageFault,
        Refusal::AckTimeout,
        Refusal::DeadLetter,
    ];

    pub const fn answer(self) -> RefusalAnswer {
        let (code, detail, retry_after) = match self {
            Refusal::Busy => (
                "busy",
                "no free buffer within limits.wait: send it again",
                1,
            ),
            Refusal::SpoolFull => (
                "spool_full",
                "the destination is behind and spool.size is spent: send it again later",
                5,
            ),
            Refusal::StorageFault => (
                "storage_fault",
                "the disk failed before the records were durable: send them again",
                5,
            ),
            Refusal::AckTimeout => (
                "ack_timeout",
                "not delivered within limits.ack; the records are in the spool and will be",
                5,
            ),
            Refusal::DeadLetter => (
                "dead_letter",
                "the destination does not take the records; they are kept as a dead letter",
                5,
            ),
        };
        RefusalAnswer {
            code,
            detail,
            retry_after,
        }
    }
}

/// What the peer got wrong. One table ([`Reject::answer`]) maps each to its answer; nothing of the request is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// The request line or a header field cannot be read, or can be read in two ways.
    Head(&'static str),
    /// The head is larger than a slab of the smallest class.
    HeadSize,
    /// More header fields than weir looks at.
    HeaderCount,
    /// The chunked framing cannot be read.
    Chunk(&'static str),
    /// The peer ended the stream before the end of the body.
    BodyTruncated,
    /// The body does not fit a slab of the largest class.
    BodySize,
    /// One record is larger than `limits.record`.
    RecordSize,
    /// A record that is not an object, on a route whose rows are the records themselves.
    RecordNotObject,
    /// A method other than POST and PUT; the answer to HEAD has no content (RFC 9110 §9.3.2).
    Method { head: bool },
    /// No route for the path.
    Route,
    /// An expectation other than `100-continue`.
    Expectation,
    /// A transfer coding other than chunked.
    TransferCoding,
    /// A content coding other than identity.
    ContentCoding,
    /// The body is not what RFC 8259 calls JSON text, or a sequence of such.
    Json(JsonError),
}

/// How a [`Reject`] is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RejectAnswer {
    /// HTTP status code.
    pub status: u16,
    /// The stable name in the body's `code` and in the metric's label.
    pub code: &'static str,
    /// One sentence for the sender.
    pub detail: &'static str,
    /// Whether the place where the next request begins is still known.
    pub in_sync: bool,
}

impl Reject {
    /// Every code, in the order of the metric's labels.
    pub const CODES: [&'static str; 20] = [
        "bad_head",
        "head_too_large",
        "too_many_headers",
        "bad_chunk",
        "body_truncated",
        "body_too_large",
        "record_too_large",
        "record_not_object",
        "method_not_allowed",
        "no_route",
        "expectation_failed",
        "transfer_coding_unsupported",
        "content_coding_unsupported",
        "json_syntax",
        "json_depth",
        "json_utf8",
        "json_truncated",
        "json_scalar",
        "empty_body",
        "json_other",
    ];

    /// The answer to this reject.
    pub fn answer(&self) -> RejectAnswer {
        let answer = |status, code, detail, in_sync| RejectAnswer {
            status,
            code,
            detail,
            in_sync,
        };
        match *self {
            Reject::Head(detail) => answer(400, "bad_head", detail, false),
            Reject::HeadSize => answer(
                431,
                "head_too_large",
                "the head is larger than 16 KiB",
                false,
            ),
            Reject::HeaderCount => {
                answer(431, "too_many_headers", "more than 64 header fields", false)
            }
            Reject::Chunk(detail) => answer(400, "bad_chunk", detail, false),
            Reject::BodyTruncated => answer(
                400,
                "body_truncated",
                "the stream ended before the body did",
                false,
            ),
            Reject::BodySize => answer(
                413,
                "body_too_large",
                "the request is larger than a slab of the largest class: send fewer records per request",
                false,
            ),
            Reject::RecordSize => answer(
                413,
                "record_too_large",
                "a record is larger than limits.record",
                true,
            ),
            Reject::RecordNotObject => answer(
                400,
                "record_not_object",
                "this route stores records as rows, so each must be an object",
                true,
            ),
            Reject::Method { .. } => {
                answer(405, "method_not_allowed", "POST or PUT stores events", true)
            }
            Reject::Route => answer(404, "no_route", "no route for this path", true),
            Reject::Expectation => answer(
                417,
                "expectation_failed",
                "the only expectation weir meets is 100-continue",
                false,
            ),
            Reject::TransferCoding => answer(
                501,
                "transfer_coding_unsupported",
                "the only transfer coding is chunked",
                false,
            ),
            Reject::ContentCoding => answer(
                415,
                "content_coding_unsupported",
                "send the body without Content-Encoding",
                true,
            ),
            Reject::Json(error) => answer(400, error.code, error.detail, true),
        }
    }

    /// The place of this reject's code in [`Reject::CODES`].
    pub fn code_index(&self) -> usize {
        let code = self.answer().code;
        Self::CODES
            .iter()
            .position(|known| *known == code)
            .unwrap_or(Self::CODES.len() - 1)
    }
}

/// Why a batch is not delivered yet, or never will be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {detail} ({code})")]
pub struct UploadError {
    pub remedy: Remedy,
    pub step: UploadStep,
    /// The service's own code where it sent one (`ServerBusy`, `AADSTS7000215`), else weir's, in snake case.
    pub code: String,
    /// What happened, and where somebody must act, what to change.
    pub detail: String,
}

/// What to do after an [`UploadError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Try again, not before the service's own pause where it named one.
    Retry { after: Option<Duration> },
    /// A refresh of what was refused is under way; try again when it is done.
    Refresh,
    /// Nothing will change until an operator acts; keep the batch, try again at leisure.
    Park,
    /// This batch will never be taken; put it away with the reason.
    DeadLetter,
}

/// Where in a delivery it happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UploadStep {
    /// Asking the endpoint where to log in.
    Endpoint,
    Token,
    /// Fetching the ingestion resources and the identity token.
    Resources,
    PutBlob,
    PostMessage,
}

impl UploadStep {
    /// In messages and as a metric's label.
    pub const fn name(self) -> &'static str {
        match self {
            UploadStep::Endpoint => "endpoint",
            UploadStep::Token => "token",
            UploadStep::Resources => "resources",
            UploadStep::PutBlob => "put_blob",
            UploadStep::PostMessage => "post_message",
        }
    }
}

impl std::fmt::Display for UploadStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
impl Reject {
    /// One of each kind.
    pub fn samples() -> Vec<Reject> {
        let json = |code| {
            Reject::Json(JsonError {
                code,
                offset: usize::MAX,
                line: usize::MAX,
                detail: "a detail as long as the longest of the JSON checker's details may well become",
            })
        };
        let mut samples = vec![
            Reject::Head("an HTTP/1.1 request has exactly one Host field"),
            Reject::HeadSize,
            Reject::HeaderCount,
            Reject::Chunk("a malformed chunk size line"),
            Reject::BodyTruncated,
            Reject::BodySize,
            Reject::RecordSize,
            Reject::RecordNotObject,
            Reject::Method { head: false },
            Reject::Route,
            Reject::Expectation,
            Reject::TransferCoding,
            Reject::ContentCoding,
        ];
        samples.extend(Self::CODES[samples.len()..].iter().copied().map(json));
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_counted_under_its_own_label() {
        let samples = Reject::samples();
        assert_eq!(samples.len(), Reject::CODES.len());
        for (index, reject) in samples.iter().enumerate() {
            assert_eq!(reject.code_index(), index, "{reject:?}");
        }
    }
}
