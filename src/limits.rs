//! Every limit fixed at compile time, and the asserts that tie the limits to each other.
//!
//! Nothing comes before this file: every other module reads its numbers from here.
//! What an operator may change is a key of the configuration (`config.rs`);
//! the bounds of those keys are here.
//! No thread, no allocation: constants and `const fn` only.
//!
//! Names end in their unit: `_SIZE` is bytes, `_COUNT` is things, `_SECONDS` is time.
//! Measured sizes (the deflate state, a connection) are here too, since `budget.rs` adds them up;
//! the arithmetic itself is there.

use std::time::Duration;

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;
pub const GIB: usize = 1 << 30;

// Sizes are `usize` throughout; a slab class of 1 GiB × 1,024 must not wrap.
const _: () = assert!(usize::BITS == 64, "weir runs on 64-bit machines only");

// --- the machine ------------------------------------------------------------------------------

/// The page of x86-64 and of most AArch64 kernels, in bytes.
/// Slab sizes are multiples of it, since the kernel pins whole pages.
pub const PAGE_SIZE: usize = 4 * KIB;

/// The most reactors one process starts.
/// A bound for the sums, far above any machine weir was tried on.
pub const CORE_COUNT_MAX: usize = 1024;

/// Submission entries of each core's ring; the kernel gives the completion side twice as many.
/// A connection has at most one operation in flight, and the runtime submits whenever the queue
/// is full, so this bounds the size of a submission, not the number of connections.
pub const RING_ENTRY_COUNT: usize = 1024;

/// One submission entry (64 bytes) with its two completion entries (16 bytes each).
/// Source: `struct io_uring_sqe` and `struct io_uring_cqe` in `linux/io_uring.h`.
pub const RING_ENTRY_SIZE: usize = 64 + 2 * 16;

/// The touched part of a reactor's stack, its runtime, and the in-flight operation table.
pub const REACTOR_RUNTIME_SIZE: usize = 512 * KIB;

/// What the process holds once: program pages, allocator, uplink runtime, metrics, admin HTTP.
/// The resident memory of a default node, measured, is 81 MiB, 84 MiB while it delivers a backlog of 2,200 batches, and
/// 118 MiB with 10,000 connections, whose tables make the allocator take 5 MiB more than is in them: with this, inside
/// its plan.
pub const CONTROL_SIZE: usize = 24 * MIB;

/// What the uplink holds for the one batch of each core that it delivers at a time: a thread for
/// the file system, names, handles, and a window on its segment where it is no longer in memory.
pub const UPLINK_TRANSFER_SIZE: usize = 256 * KIB + FRAME_BUFFER_SIZE;

/// What one blob on its way to Kusto holds: read from its segment, a window, a piece in the channel, one with the HTTP
/// client and one being sent; a TLS connection and its buffers; names, URLs and the message.
/// (A blob in memory is sent from its upload buffer.)
pub const KUSTO_TRANSFER_SIZE: usize = 4 * FRAME_BUFFER_SIZE + 256 * KIB;

/// What is known of a delivery between two attempts: names, and where the blob is.
pub const DELIVERY_STATE_SIZE: usize = 8 * KIB;

/// Deliveries that failed and rest without a place among those on their way; further ones rest in their place.
pub const DELIVERY_RESTING_MAX: usize = 64;

/// What the Kusto client holds: an answer of the service as text and as JSON, resources, certificates, idle connections.
pub const KUSTO_CLIENT_SIZE: usize = 3 * MANAGEMENT_ANSWER_SIZE_MAX;

/// The upper bound of `uplink.concurrency`.
pub const UPLINK_CONCURRENCY_MAX: usize = 64;

/// Between the attempts to deliver a batch: from the first to the last, doubling.
pub const DELIVERY_PAUSE_MIN: Duration = Duration::from_millis(100);
pub const DELIVERY_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Between the attempts where only an operator can help.
pub const DELIVERY_PARKED_PAUSE: Duration = Duration::from_secs(60);

// --- dead letters -----------------------------------------------------------------------------

/// The upper bound of `dead_letter.age`: longer is a mistake of units.
pub const DEAD_LETTER_AGE_MAX: Duration = Duration::from_secs(3650 * 24 * 60 * 60);

/// Of size and age of the dead letters, in hundredths: from here on the log warns.
pub const DEAD_LETTER_WARN_PERCENT: u64 = 75;

/// How often the age of dead letters is looked at.
pub const DEAD_LETTER_CHECK_PAUSE: Duration = Duration::from_secs(60 * 60);

/// The file beside a dead letter that says why, in bytes.
pub const DEAD_LETTER_REASON_SIZE_MAX: usize = 64 * KIB;

// --- the listener and its connections ---------------------------------------------------------

/// Listeners in one configuration. Each is one socket per core.
pub const LISTENER_COUNT_MAX: usize = 64;

/// The upper bound of `limits.connections`, per core.
/// Linux refuses more file descriptors than this unless `fs.nr_open` is raised.
pub const CONNECTION_COUNT_MAX: usize = 1 << 20;

/// Connections that the kernel keeps for one listening socket until they are accepted.
pub const LISTEN_BACKLOG: i32 = 4096;

/// After its last answer a connection is read for this long and this far, so that the answer is
/// not lost to a reset.
pub const LINGER_TIME: Duration = Duration::from_secs(1);
pub const LINGER_SIZE_MAX: usize = 64 * KIB;

/// The largest body of a request that is refused by its head, and is read and dropped nevertheless so that the
/// connection can go on; beyond it, closing is cheaper for both.
pub const UNREAD_SIZE_MAX: usize = 64 * KIB;

/// The future of a connection: with what the runtime adds to it, an allocation of 2 KiB.
pub const CONNECTION_TASK_SIZE_MAX: usize = 2 * KIB - 112;

/// What one open connection costs when it holds no slab: its task, its descriptor, its parser's
/// state and its share of the runtime. Measured: 3.0 to 3.3 KiB of resident memory each, at 10,000; the rest is for its
/// places in the tables of deadlines and of addresses, which are there from the start.
pub const CONNECTION_STATE_SIZE: usize = 3 * KIB + 512;

// --- HTTP/2 -----------------------------------------------------------------------------------

/// The upper bound of `http2.connections`, per core.
pub const HTTP2_CONNECTION_COUNT_MAX: usize = 1 << 16;

/// The upper bound of `http2.streams`.
pub const HTTP2_STREAM_COUNT_MAX: usize = 1000;

/// The bounds of `http2.window`. RFC 9113 §6.9.2 has 65,535 where nothing is said.
pub const HTTP2_WINDOW_SIZE_MIN: usize = 16 * KIB;
pub const HTTP2_WINDOW_SIZE_MAX: usize = 2 * MIB;

/// The flow-control window of a connection at its start, in bytes; settings do not change it (RFC 9113 §6.9.2).
pub const HTTP2_CONNECTION_WINDOW_SIZE_MIN: usize = 65_535;

/// What a connection of `stream_count` streams may have in flight, in bytes: as much as all of them together, so that
/// those that wait for memory never keep the others from receiving.
pub const fn http2_connection_window_size(stream_count: usize, window_size: usize) -> usize {
    let size = stream_count * window_size;
    if size < HTTP2_CONNECTION_WINDOW_SIZE_MIN {
        HTTP2_CONNECTION_WINDOW_SIZE_MIN
    } else {
        size
    }
}

/// The largest frame that is taken, without its header: the least that RFC 9113 §4.2 allows.
pub const HTTP2_FRAME_SIZE_MAX: usize = 16 * KIB;

/// A header section as RFC 9113 §6.5.2 counts it, with 32 bytes for each field: what a head of HTTP/1.1 would hold.
pub const HTTP2_HEADER_LIST_SIZE_MAX: usize = HEAD_SIZE_MAX + 32 * HEADER_COUNT_MAX;

/// HPACK's dynamic table, in bytes (RFC 7541 §4.2): what it is where nothing is said.
pub const HTTP2_HEADER_TABLE_SIZE: usize = 4 * KIB;

/// Streams of one connection that are reset by the peer before they are looked at.
pub const HTTP2_PENDING_RESET_COUNT_MAX: usize = 20;

/// Streams that weir resets over the life of a connection, because the peer got them wrong or opened too many. A peer
/// that has not seen the settings yet may open 100 at once.
pub const HTTP2_ERROR_RESET_COUNT_MAX: usize = 164;

/// How long a stream that weir has reset is remembered, so that what was on its way is ignored.
pub const HTTP2_RESET_TIME: Duration = Duration::from_secs(1);

/// What small DATA frames may cost that no stream has taken yet, in bytes.
pub const HTTP2_DATA_FRAME_BUDGET: usize = 256 * KIB;

/// What one stream may have waiting to be sent, in bytes.
pub const HTTP2_SEND_BUFFER_SIZE: usize = 16 * KIB;

/// What a connection reads before its streams have a turn, in bytes.
pub const HTTP2_TURN_SIZE: usize = 16 * KIB;

/// Frames that carry nothing of a request, and RST_STREAM frames, that a peer may send in this time.
pub const HTTP2_METER_WINDOW: Duration = Duration::from_secs(10);
pub const HTTP2_CONTROL_FRAME_COUNT_MAX: u64 = 1_000;
pub const HTTP2_RESET_COUNT_MAX: u64 = 200;

/// What each request adds to the former: some clients open a window or set a priority with every one.
pub const HTTP2_CONTROL_FRAMES_PER_REQUEST: u64 = 4;

/// The age at which a connection is ended, give or take a tenth, so that senders spread anew.
pub const HTTP2_CONNECTION_AGE_MAX: Duration = Duration::from_secs(60 * 60);

/// What one connection holds beside its window: read and write buffers, tables of HPACK, small frames, and what is
/// remembered of streams that were reset; over TLS a record that is opened, and two to be sent.
pub const HTTP2_CONNECTION_STATE_SIZE: usize =
    HTTP2_DATA_FRAME_BUDGET + 128 * KIB + 3 * TLS_RECORD_SIZE_MAX;

/// What one stream holds beside its window and its slab: its task, its head, its answer. `tests/allocation.rs` holds it
/// against what streams with large heads allocate.
pub const HTTP2_STREAM_STATE_SIZE: usize = HEAD_SIZE_MAX + 8 * KIB;

// --- TLS --------------------------------------------------------------------------------------

/// The plaintext of one record (RFC 8446 §5.1).
pub const TLS_PLAINTEXT_SIZE_MAX: usize = 1 << 14;

/// What encryption adds to it at most, padding included (RFC 8446 §5.2); AEADs of TLS 1.2 add 24.
pub const TLS_EXPANSION_SIZE_MAX: usize = 256;

/// Type, version and length.
pub const TLS_HEADER_SIZE: usize = 5;

/// One record as it is sent.
pub const TLS_RECORD_SIZE_MAX: usize =
    TLS_HEADER_SIZE + TLS_PLAINTEXT_SIZE_MAX + TLS_EXPANSION_SIZE_MAX;

/// The smallest slab in which a head is sure to become whole: all of it but a byte, and a record behind it.
pub const TLS_SLAB_SIZE_MIN: usize =
    (HEAD_SIZE_MAX + TLS_RECORD_SIZE_MAX).next_multiple_of(PAGE_SIZE);

/// What an open TLS connection holds besides [`CONNECTION_STATE_SIZE`]: keys, buffers for what is sent, and the chain that
/// the client has shown. Measured: 4.3 KiB of resident memory each at 2,000, 6.3 KiB where the client has shown one
/// certificate; the rest is for another one or two. (`tests/allocation.rs` holds the heap to it.)
pub const TLS_CONNECTION_STATE_SIZE: usize = 8 * KIB;

/// What a core holds while it opens records: the plaintext of one twice, the messages of a handshake and the work on
/// them.
pub const TLS_OPEN_SIZE: usize = 2 * TLS_PLAINTEXT_SIZE_MAX + 64 * KIB;

/// A certificate with its chain, a key, the certificates of an authority, or what it has revoked, in bytes.
pub const TLS_FILE_SIZE_MAX: usize = 4 * MIB;

/// How often it is looked whether such files have changed; a change is taken once it is as old as this.
pub const TLS_FILE_CHECK_PAUSE: Duration = Duration::from_secs(2);

/// From here on to its expiry a certificate is warned about.
pub const TLS_EXPIRY_WARNING: Duration = Duration::from_secs(14 * 24 * 60 * 60);

// --- slabs ------------------------------------------------------------------------------------

/// Slabs per core, over all classes.
/// tokio-uring 0.5 registers no more than 1,024 buffers and drops the rest without a word.
pub const SLAB_COUNT_MAX: usize = 1024;

/// Slab classes in one configuration; each has three gauges in the metrics.
pub const SLAB_CLASS_COUNT_MAX: usize = 8;

/// The smallest class must take the largest head: a head is parsed in one slab.
pub const SLAB_SIZE_MIN: usize = HEAD_SIZE_MAX;

/// The kernel refuses to register a single buffer above 1 GiB.
/// Source: `io_uring_register(2)`, `IORING_REGISTER_BUFFERS`.
pub const SLAB_SIZE_MAX: usize = GIB;

// --- the request ------------------------------------------------------------------------------

/// The header of the PROXY protocol, in bytes: the addresses take some 50, the rest is what proxies add to them.
pub const PROXY_HEADER_SIZE_MAX: usize = 4 * KIB;

/// Request line and header fields together, in bytes.
pub const HEAD_SIZE_MAX: usize = 16 * KIB;

/// The request line: method, target and version.
/// RFC 9112 §3 recommends to support at least 8,000 octets.
pub const REQUEST_LINE_SIZE_MAX: usize = 8 * KIB;

/// Header fields in one head.
pub const HEADER_COUNT_MAX: usize = 64;

/// Chunk extensions of one chunk (RFC 9112 §7.1.1: a recipient ought to limit them), in bytes.
pub const CHUNK_EXTENSION_SIZE_MAX: usize = 256;

/// Chunk extensions of all chunks of a body, in bytes.
pub const CHUNK_EXTENSIONS_SIZE_MAX: usize = 4 * KIB;

/// The trailer section of a chunked body, in bytes.
pub const TRAILER_SIZE_MAX: usize = 4 * KIB;

/// The longest reply weir writes, head and body, in bytes.
pub const REPLY_SIZE_MAX: usize = 512;

/// Replies that a connection gathers for one write, in bytes.
pub const REPLY_BUFFER_SIZE: usize = 2 * REPLY_SIZE_MAX;

/// Nesting of arrays and objects in a record.
pub const JSON_DEPTH_MAX: usize = 128;

/// The piece of a body that is classified before the first of its bytes moves. Large enough that
/// its tokens fill several words of 64, small enough that bytes, masks and tokens share the
/// first-level cache with everything else.
pub const JSON_CHUNK_SIZE: usize = 4 * KIB;

/// What the JSON pass needs besides one bit per byte of the slab: its stack and its blocks.
pub const JSON_SCRATCH_FIXED_SIZE: usize = 32 * KIB;

/// Where a row is put together and a reply is written, per core, in bytes.
pub const STAGING_SIZE: usize = 64 * KIB;

// --- routes -----------------------------------------------------------------------------------

/// Routes in one configuration; so also the most tables.
pub const ROUTE_COUNT_MAX: usize = 1024;

/// A database's or table's name, in characters.
/// Source: "Entity names" in the Kusto documentation.
pub const ENTITY_NAME_SIZE_MAX: usize = 1024;

/// A name in a directory, in bytes (`NAME_MAX` of Linux).
pub const FILE_NAME_SIZE_MAX: usize = 255;

// --- who may send -----------------------------------------------------------------------------

/// Principals in one configuration.
/// A token is compared with those of all of them, so that the time says nothing.
pub const PRINCIPAL_COUNT_MAX: usize = 256;

/// The name of a principal, in characters.
pub const PRINCIPAL_NAME_SIZE_MAX: usize = 64;

/// Secrets of one principal: the one in use, and those it is rotated from and to.
pub const SECRET_COUNT_MAX: usize = 8;

/// Names of certificates of one principal.
pub const SUBJECT_COUNT_MAX: usize = 64;

/// User and password of Basic with the colon between them, in bytes: whole groups of base64.
pub const BASIC_SIZE_MAX: usize = 768;

/// Networks in one list: it is searched one by one.
pub const NETWORK_COUNT_MAX: usize = 256;

/// The name of the header field that a signature is in.
pub const HEADER_NAME_SIZE_MAX: usize = 256;

/// Requests or bytes a second; more is a mistake of units.
pub const RATE_MAX: u64 = 1_000_000_000_000;

// --- rows -------------------------------------------------------------------------------------

/// The upper bound of `limits.record`: a record must fit the largest slab there can be.
pub const RECORD_SIZE_MAX: usize = SLAB_SIZE_MAX;

/// The longest tag; a longer one is cut here.
/// The tag is repeated in every row of a request, so without a bound a long path in front of many
/// small records would cost many times its size in compression.
pub const TAG_SIZE_MAX: usize = KIB;

/// `{"timestamp":"2026-11-23T09:15:02.123Z","tag":"","log":}` without tag and record.
pub const ENVELOPE_FIXED_SIZE: usize =
    br#"{"timestamp":"2026-11-23T09:15:02.123Z","tag":"","log":}"#.len();

/// All that the widest envelope and the line's end add to a record.
pub const ENVELOPE_SIZE_MAX: usize = ENVELOPE_FIXED_SIZE + TAG_SIZE_MAX + 1;

/// The longest row a record of `record_size` bytes can become, with its newline.
pub const fn row_size_max(record_size: usize) -> usize {
    record_size + ENVELOPE_SIZE_MAX
}

// --- compression ------------------------------------------------------------------------------

/// RFC 1952 §2.3: a header without optional fields.
pub const GZIP_HEADER_SIZE: usize = 10;

/// RFC 1952 §2.3: CRC32 and ISIZE.
pub const GZIP_TRAILER_SIZE: usize = 8;

pub const COMPRESSION_LEVEL_MIN: u8 = 1;
pub const COMPRESSION_LEVEL_MAX: u8 = 9;

/// What one streaming deflate holds: window, hash chains, symbol and pending buffers.
/// `tests/allocation.rs` holds it against what zlib-rs allocates.
pub const DEFLATE_STATE_SIZE: usize = 372 * KIB;

/// The most bytes deflate makes of `raw_size` bytes, whatever they are and whatever the level,
/// without gzip's header and trailer.
///
/// The form is that of zlib's conservative `deflateBound`, for any window and memory level:
/// an eighth for nine-bit literals, one in 64 for the blocks' headers.
/// The fixed 64 bytes take the final block and a few flushes.
/// This counts from an empty encoder: what an encoder was fed before and still holds comes out
/// later, so a bound on the next write is a bound on all raw bytes since its last flush.
pub const fn deflate_size_max(raw_size: usize) -> usize {
    raw_size + raw_size.div_ceil(8) + raw_size.div_ceil(64) + 64
}

// --- upload buffers ---------------------------------------------------------------------------

/// One buffer is open while another is with the uplink; with a single one every seal would stop
/// the core.
pub const UPLOAD_BUFFER_COUNT_MIN: usize = 2;

/// The upper bound of `upload.buffer_count`.
pub const UPLOAD_BUFFER_COUNT_MAX: usize = 1024;

/// The upper bound of `upload.buffer_size`.
pub const UPLOAD_BUFFER_SIZE_MAX: usize = GIB;

/// The smallest upload buffer that takes one record of `record_size` bytes whatever it holds.
/// Without this, a record could be valid and fit no buffer, not even an empty one.
pub const fn upload_buffer_size_min(record_size: usize) -> usize {
    GZIP_HEADER_SIZE + deflate_size_max(row_size_max(record_size)) + GZIP_TRAILER_SIZE
}

// --- the spool --------------------------------------------------------------------------------

/// What a disk writes whole or not at all: a logical block. Frames begin and end on it, so that no
/// write touches bytes that an earlier one has made durable.
pub const SECTOR_SIZE: usize = 512;

/// The head of a segment: what its batch is, and in the last sector whether it was delivered.
/// Format: `docs/SPOOL_FORMAT.md`.
pub const SEGMENT_HEADER_SIZE: usize = 4 * KIB;

/// The head of a frame; the same bytes stand at its end once more.
pub const FRAME_HEADER_SIZE: usize = 64;

/// Where a frame is put together before it is written, per core, in bytes.
/// A commit that does not fit becomes several frames.
pub const FRAME_BUFFER_SIZE: usize = 256 * KIB;

/// The bytes a frame with `payload_size` bytes takes on disk.
pub const fn frame_size(payload_size: usize) -> usize {
    (payload_size + 2 * FRAME_HEADER_SIZE).next_multiple_of(SECTOR_SIZE)
}

/// The largest payload of a frame that is written together with the segment's header.
pub const FRAME_PAYLOAD_SIZE_MAX: usize =
    FRAME_BUFFER_SIZE - SEGMENT_HEADER_SIZE - 2 * FRAME_HEADER_SIZE;

/// The bytes of a segment that holds a batch of `buffer_size` bytes: the batch, and a sixteenth for
/// heads and padding. Many small commits use that up, and then the batch is sealed early.
pub const fn segment_size(buffer_size: usize) -> usize {
    SEGMENT_HEADER_SIZE
        + (buffer_size + buffer_size / 16 + 4 * SECTOR_SIZE).next_multiple_of(PAGE_SIZE)
}

/// The most segments of one spool.
pub const SEGMENT_COUNT_MAX: usize = 1 << 20;

/// Segments per core at least: one is filled while another is delivered.
pub const SEGMENT_COUNT_MIN: usize = 2;

/// What the process remembers of each segment while its batch waits for delivery.
pub const SEGMENT_STATE_SIZE: usize = 256;

/// What a core remembers of each batch whose delivery somebody may wait for: an entry in the queue
/// that reports it, and one in the order of the table's batches.
pub const REPORT_STATE_SIZE: usize = 64;

// --- secrets ----------------------------------------------------------------------------------

/// A secret in a file or an environment variable, in bytes: a certificate with its chain and key is far below.
pub const SECRET_SIZE_MAX: usize = 64 * KIB;

// --- Kusto ------------------------------------------------------------------------------------

/// Hosts in `destination.trusted_hosts`.
pub const TRUSTED_HOST_COUNT_MAX: usize = 64;

/// A tenant's or client's id, in bytes: a GUID, or a domain name (RFC 1035 §2.3.4).
pub const IDENTITY_ID_SIZE_MAX: usize = 255;

/// What one request to Azure may take. A connection that is not there in this time is tried elsewhere.
pub const AZURE_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Loopback and the machine's own metadata service answer at once, or are not there.
pub const LOCAL_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The question where to log in.
pub const AUTH_METADATA_TIMEOUT: Duration = Duration::from_secs(10);

/// A management command; the official clients allow an hour, which a shipper can't wait for.
pub const MANAGEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A token, with the retries of the identity library: the metadata service of a virtual machine may be away for 70 s
/// while it is updated.
pub const TOKEN_TIMEOUT: Duration = Duration::from_secs(90);

/// How often a login endpoint is asked again for one token.
pub const TOKEN_RETRY_COUNT_MAX: u32 = 3;

/// A certificate's assertion is good for this long: it is used at once.
pub const ASSERTION_LIFETIME: Duration = Duration::from_secs(5 * 60);

/// One message into one queue.
pub const QUEUE_POST_TIMEOUT: Duration = Duration::from_secs(30);

/// One blob, with the time that its size takes at the slowest rate that is still worth waiting for.
pub const BLOB_PUT_TIMEOUT_MIN: Duration = Duration::from_secs(30);
pub const BLOB_PUT_RATE_MIN: u64 = 256 * KIB as u64;

/// The time for a blob of `size` bytes.
pub const fn blob_put_timeout(size: u64) -> Duration {
    Duration::from_secs(BLOB_PUT_TIMEOUT_MIN.as_secs() + size / BLOB_PUT_RATE_MIN)
}

/// Answers are read this far: a list of resources holds some dozens of URLs of some hundred bytes.
pub const MANAGEMENT_ANSWER_SIZE_MAX: usize = 4 * MIB;
pub const STORAGE_ANSWER_SIZE_MAX: usize = 16 * KIB;

/// Ingestion resources of one kind that are looked at; a cluster has some dozens.
pub const RESOURCE_COUNT_MAX: usize = 1024;

/// Resources that one attempt tries, each in another place. As the official clients.
pub const STORAGE_ATTEMPT_COUNT: usize = 3;

/// The JSON of a queue message; in base64 it is 64 KiB, the largest message of Azure Storage queues.
pub const MESSAGE_SIZE_MAX: usize = 48 * KIB;

/// Bytes of a blob in memory that are written at a time: some 30 µs of a CPU in the kernel.
pub const BLOB_PIECE_SIZE: usize = 128 * KIB;

/// Raw bytes of one blob. Source: "Ingestion limits" in the Kusto documentation.
pub const BLOB_RAW_SIZE_MAX: u64 = 6 * GIB as u64;

/// Characters of a database's and of a table's name in the name of a blob, which has 1,024 at most.
pub const BLOB_NAME_ENTITY_SIZE_MAX: usize = 200;

/// Ingestion resources and the identity token are fetched again at this age, give or take a tenth.
pub const RESOURCE_REFRESH_AGE: Duration = Duration::from_secs(60 * 60);

/// Between a refresh that failed and the next: from the first to the last, doubling.
/// (Unit tests do not wait.)
pub const RESOURCE_RETRY_PAUSE_MIN: Duration = match cfg!(test) {
    true => Duration::from_millis(10),
    false => Duration::from_secs(1),
};
pub const RESOURCE_RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Between two refreshes that deliveries asked for: many may be refused at the same time.
pub const RESOURCE_REQUEST_PAUSE: Duration = match cfg!(test) {
    true => Duration::from_millis(10),
    false => Duration::from_secs(10),
};

/// How long a delivery waits for the first resources.
pub const RESOURCE_WAIT: Duration = Duration::from_secs(15);

/// A signature that ends sooner than this is not put into a message: the service reads the blob later.
pub const SAS_LIFETIME_LEFT_MIN: Duration = Duration::from_secs(60 * 60);

/// The longest pause that a service can ask for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(5 * 60);

/// The success of a storage account is remembered in this many buckets of this length. As the official clients.
pub const RANK_BUCKET_COUNT: usize = 6;
pub const RANK_BUCKET_TIME: Duration = Duration::from_secs(10);

/// Azure refuses signatures and tokens when clocks differ by about this much.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_secs(5 * 60);

// --- times and sums ---------------------------------------------------------------------------

/// The upper bound of every duration in the configuration: longer is a mistake of units.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The lower bound of `memory.limit`: less is a mistake of units.
pub const MEMORY_LIMIT_MIN: u64 = MIB as u64;

/// The most that one core may hold under the default configuration.
pub const CORE_SIZE_DEFAULT_MAX: u64 = 64 * MIB as u64;

// --- how the limits hang together -------------------------------------------------------------

const _: () = {
    // A head fits the smallest slab, and a request line fits a head with room for fields.
    assert!(HEAD_SIZE_MAX <= SLAB_SIZE_MIN);
    assert!(REQUEST_LINE_SIZE_MAX < HEAD_SIZE_MAX);
    assert!(SLAB_SIZE_MIN.is_multiple_of(PAGE_SIZE) && SLAB_SIZE_MAX.is_multiple_of(PAGE_SIZE));
    // The ring names a buffer by 16 bits.
    assert!(SLAB_COUNT_MAX <= u16::MAX as usize);
    // A window is counted by 31 bits (RFC 9113 §6.9.1), and takes a frame of the largest size.
    assert!(
        http2_connection_window_size(HTTP2_STREAM_COUNT_MAX, HTTP2_WINDOW_SIZE_MAX)
            <= i32::MAX as usize
    );
    assert!(HTTP2_FRAME_SIZE_MAX <= HTTP2_WINDOW_SIZE_MIN);
    // RFC 9113 §4.2.
    assert!(HTTP2_FRAME_SIZE_MAX >= 16_384 && HTTP2_FRAME_SIZE_MAX < 1 << 24);
    assert!(REPLY_SIZE_MAX <= HTTP2_SEND_BUFFER_SIZE);
    // A PROXY header fits where a head does.
    assert!(PROXY_HEADER_SIZE_MAX < HEAD_SIZE_MAX);
    // A line of chunked framing fits what a head leaves of the smallest slab.
    assert!(TRAILER_SIZE_MAX < SLAB_SIZE_MIN);
    // A tag is a part of the request line, and an envelope and a reply are staged whole.
    assert!(TAG_SIZE_MAX < REQUEST_LINE_SIZE_MAX);
    assert!(ENVELOPE_SIZE_MAX + REPLY_SIZE_MAX <= STAGING_SIZE);
    // Every record that may be configured fits some upload buffer's arithmetic without wrapping.
    assert!(upload_buffer_size_min(RECORD_SIZE_MAX) < usize::MAX / 2);
    // Deflate never promises to shrink.
    assert!(deflate_size_max(0) > 0 && deflate_size_max(MIB) > MIB);
    // Open buffers are named by 16 bits, like slabs.
    assert!(UPLOAD_BUFFER_COUNT_MIN <= UPLOAD_BUFFER_COUNT_MAX);
    assert!(UPLOAD_BUFFER_COUNT_MAX <= u16::MAX as usize);
    assert!(ENTITY_NAME_SIZE_MAX >= FILE_NAME_SIZE_MAX);
    // A frame buffer is written as it is, with the segment's header in front or without.
    assert!(FRAME_BUFFER_SIZE.is_multiple_of(PAGE_SIZE) && SEGMENT_HEADER_SIZE == PAGE_SIZE);
    assert!(SEGMENT_HEADER_SIZE + frame_size(FRAME_PAYLOAD_SIZE_MAX) <= FRAME_BUFFER_SIZE);
    // However a payload is split in two, it takes this much more at most.
    assert!(2 * FRAME_HEADER_SIZE + SECTOR_SIZE <= 2 * SECTOR_SIZE);
    assert!(frame_size(0) == SECTOR_SIZE && frame_size(SECTOR_SIZE) == 2 * SECTOR_SIZE);
    // A segment is numbered by 32 bits, and holds a batch of any size in frames of any size.
    assert!(SEGMENT_COUNT_MAX <= u32::MAX as usize);
    assert!(segment_size(UPLOAD_BUFFER_SIZE_MAX) < u32::MAX as usize);
    assert!(COMPRESSION_LEVEL_MIN < COMPRESSION_LEVEL_MAX);
    // A message is base64 in a queue of 64 KiB, and the name of a blob fits what Azure Storage takes.
    assert!(MESSAGE_SIZE_MAX / 3 * 4 == 64 * KIB);
    assert!(2 * BLOB_NAME_ENTITY_SIZE_MAX + 4 + FILE_NAME_SIZE_MAX <= 1024);
    assert!(STORAGE_ATTEMPT_COUNT > 0 && RANK_BUCKET_COUNT > 0);
    // The largest configurable sum stays far inside 64 bits.
    assert!(
        (CORE_COUNT_MAX as u128)
            * (SLAB_COUNT_MAX as u128 * SLAB_SIZE_MAX as u128
                + UPLOAD_BUFFER_COUNT_MAX as u128
                    * (UPLOAD_BUFFER_SIZE_MAX + DEFLATE_STATE_SIZE) as u128
                + CONNECTION_COUNT_MAX as u128 * CONNECTION_STATE_SIZE as u128
                + HTTP2_CONNECTION_COUNT_MAX as u128
                    * (HTTP2_CONNECTION_STATE_SIZE
                        + HTTP2_STREAM_COUNT_MAX
                            * (HTTP2_STREAM_STATE_SIZE + HTTP2_WINDOW_SIZE_MAX))
                        as u128)
            < (u64::MAX / 2) as u128
    );
};
