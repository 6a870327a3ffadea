//! No heap allocation for a request on an open connection, counted on the reactor's thread; over TLS none that stays.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering};

use support::http2::{CANCEL, DATA, END_STREAM, PING, RST_STREAM, Raw, frame, post_headers};
use support::tls::{Authority, Tunnel};
use support::{Client, chunked_request, request};
use weir::config::Config;
use weir::limits::{
    CONNECTION_STATE_SIZE, DEFLATE_STATE_SIZE, HTTP2_CONNECTION_STATE_SIZE,
    HTTP2_STREAM_STATE_SIZE, TLS_CONNECTION_STATE_SIZE,
};
use weir::node::Node;

/// Counts what one thread allocates.
struct Counting;

/// The thread whose allocations count; 0 for none.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);
/// Allocated and not given back, by the watched thread.
static HELD_BYTES: AtomicI64 = AtomicI64::new(0);

thread_local! {
    static THREAD: Cell<i32> = const { Cell::new(0) };
}

fn is_watched() -> bool {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched == 0 {
        return false;
    }
    let thread = THREAD.with(|thread| {
        if thread.get() == 0 {
            thread.set(rustix::thread::gettid().as_raw_nonzero().get());
        }
        thread.get()
    });
    thread == watched
}

fn count(size: usize, given_back: usize) {
    if is_watched() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        ALLOCATED_BYTES.fetch_add(size as u64, Ordering::Relaxed);
        HELD_BYTES.fetch_add(size as i64 - given_back as i64, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if is_watched() {
            HELD_BYTES.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller keeps `realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The thread that the kernel knows by this name.
fn thread_named(name: &str) -> i32 {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap())
        .find(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
        })
        .and_then(|task| task.file_name().to_str()?.parse().ok())
        .unwrap_or_else(|| panic!("no thread {name}"))
}

const SECRET: &str = "secret";

fn signature(body: &[u8]) -> String {
    use hmac::{Hmac, KeyInit, Mac};
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    mac.update(body);
    let bytes = mac.finalize().into_bytes();
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("X-Hub-Signature-256: sha256={digits}")
}

const CONNECTIONS: usize = 4;
const WARM_UP: usize = 400;
const REQUESTS: usize = 10_000;

/// One test, as all parts watch a thread of their own.
#[test]
fn memory_is_what_the_plan_says_and_does_not_move() {
    a_deflate_state_is_as_large_as_planned();
    ten_thousand_requests_of_each_kind_allocate_nothing_on_the_reactor();
    requests_over_tls_keep_nothing_that_they_allocate();
    streams_hold_no_more_than_their_windows_and_what_is_planned_beside();
}

const STREAMS: u32 = 100;
const WINDOW: usize = 32 * 1024;

/// As many streams as there may be, with heads as large as they may be and windows that are full, and no slab for them.
fn streams_hold_no_more_than_their_windows_and_what_is_planned_beside() {
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\nhttp2 = true\n[admin]\naddress = \"127.0.0.1:0\"\n\
                [destination]\ntype = \"null\"\n[limits]\nwait = \"60s\"\n[slabs]\nclasses = [\n\
                { size = \"16KiB\", count = 1 }, { size = \"256KiB\", count = 1 }]\n\
                [[route]]\npath = \"/*\"\nack = \"memory\"\n";
    let config = Config::parse(text, "test.toml".as_ref(), "".as_ref()).unwrap();
    let node = Node::start(config, false).unwrap();
    let address = node.listeners()[0];
    let held = || HELD_BYTES.load(Ordering::Relaxed);
    WATCHED.store(thread_named("weir-core-0"), Ordering::Relaxed);
    let serve = |raw: &mut Raw, stream: u32| {
        raw.send(&post_headers(stream, "/x", &[]));
        raw.send(&frame(DATA, END_STREAM, stream, b"{}"));
        assert_eq!(raw.answer(stream).0, "{\"accepted\":1}\n");
    };
    // What the first connection leaves is not of the next; it stays, so that nothing of it is given back meanwhile.
    let mut first = Raw::open(address);
    serve(&mut first, 1);
    let before = held();
    let mut raw = Raw::open(address);
    serve(&mut raw, 1);
    let idle = held() - before;
    let planned = HTTP2_CONNECTION_STATE_SIZE as i64;
    assert!(
        (planned / 20..=planned).contains(&idle),
        "a connection holds {idle} bytes"
    );

    let field = "v".repeat(3_500);
    let names = ["a", "b", "c", "d"];
    let mut fields = names.map(|name| (name, field.as_str())).to_vec();
    fields.push(("content-length", "200000"));
    // In small frames of all streams in turn: those that wait do not keep what the library read for all of them.
    let piece = vec![b' '; 256];
    let streams = || (0..STREAMS).map(|index| 3 + 2 * index);
    for stream in streams() {
        raw.send(&post_headers(stream, "/x", &fields));
    }
    for _ in 0..WINDOW / piece.len() {
        for stream in streams() {
            raw.send(&frame(DATA, 0, stream, &piece));
        }
    }
    raw.send(&frame(PING, 0, 0, b"received"));
    raw.until(|frame| frame.kind == PING);
    let streams_hold = held() - before - idle;
    let windows = (STREAMS as usize * WINDOW) as i64;
    let planned = windows + STREAMS as i64 * HTTP2_STREAM_STATE_SIZE as i64;
    println!("a connection holds {idle} bytes, {STREAMS} streams {streams_hold}");
    // One has the slab, and the window of it again.
    assert!(
        (windows..=planned).contains(&streams_hold),
        "{STREAMS} streams hold {streams_hold} bytes of {planned}"
    );
    for stream in streams() {
        raw.send(&frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()));
    }
    let mut stream = 2 * STREAMS + 3;
    let mut serve_many = |raw: &mut Raw| {
        for _ in 0..TLS_REQUESTS {
            serve(raw, stream);
            stream += 2;
        }
    };
    serve_many(&mut raw);
    let before = held();
    serve_many(&mut raw);
    let kept = held() - before;
    assert!(kept.abs() < KEPT_BYTES_MAX, "{kept} bytes are kept");
    WATCHED.store(0, Ordering::Relaxed);
    drop((first, raw));
    node.drain().unwrap();
}

/// Kept per request, this would be seen: 8 bytes of each.
const KEPT_BYTES_MAX: i64 = 8 * TLS_REQUESTS as i64;
const TLS_REQUESTS: usize = 2_000;

/// What a connection takes besides the heap: its descriptor is the kernel's, and its task is in the plan without TLS too.
fn requests_over_tls_keep_nothing_that_they_allocate() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.server(1).write(directory.path());
    std::fs::write(directory.path().join("ca.pem"), &authority.pem).unwrap();
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\n\
                tls = { certificate = \"tls.crt\", key = \"tls.key\", client_ca = \"ca.pem\" }\n\
                [admin]\naddress = \"127.0.0.1:0\"\n[destination]\ntype = \"null\"\n[spool]\nsize = \"64MiB\"\n";
    let config = Config::parse(text, "test.toml".as_ref(), directory.path()).unwrap();
    let node = Node::start(config, false).unwrap();
    let device = authority.client("device", 2);
    let tunnel = Tunnel::open(
        node.listeners()[0],
        authority.config(Some(&device)),
        16 * 1024,
    );
    let large = weir_perf::event::large_event(1, 0);
    let wires = [request("/a", b"{\"a\":1}"), request("/a", large.as_bytes())];
    WATCHED.store(thread_named("weir-core-0"), Ordering::Relaxed);
    let held = || HELD_BYTES.load(Ordering::Relaxed);
    let open = |count: usize| -> Vec<Client> {
        let mut clients: Vec<Client> = (0..count)
            .map(|_| Client::connect(tunnel.address))
            .collect();
        for client in &mut clients {
            for wire in &wires {
                client.send(wire);
                assert_eq!(client.reply().status, 201);
            }
        }
        clients
    };
    let mut clients = open(1);
    let before = held();
    clients.extend(open(CONNECTIONS));
    let each = (held() - before) / CONNECTIONS as i64;
    let planned = (TLS_CONNECTION_STATE_SIZE + CONNECTION_STATE_SIZE) as i64;
    assert!(
        (planned / 4..=planned).contains(&each),
        "a connection holds {each} bytes"
    );
    let before = held();
    for round in 0..TLS_REQUESTS {
        let client = &mut clients[round % CONNECTIONS];
        client.send(&wires[usize::from(round % 50 == 0)]);
        assert_eq!(client.reply().status, 201);
    }
    let kept = held() - before;
    assert!(kept.abs() < KEPT_BYTES_MAX, "{kept} bytes are kept");
    WATCHED.store(0, Ordering::Relaxed);
    drop(clients);
    node.drain().unwrap();
}

fn a_deflate_state_is_as_large_as_planned() {
    WATCHED.store(
        rustix::thread::gettid().as_raw_nonzero().get(),
        Ordering::Relaxed,
    );
    for level in [1, 2, 6, 9] {
        let before = ALLOCATED_BYTES.load(Ordering::Relaxed);
        let member = weir::deflate::GzipMember::new(level);
        let size = ALLOCATED_BYTES.load(Ordering::Relaxed) - before;
        drop(member);
        assert!(
            size <= DEFLATE_STATE_SIZE as u64,
            "level {level}: {size} bytes"
        );
        assert!(
            size > DEFLATE_STATE_SIZE as u64 / 2,
            "level {level}: {size} bytes"
        );
    }
    WATCHED.store(0, Ordering::Relaxed);
}

fn ten_thousand_requests_of_each_kind_allocate_nothing_on_the_reactor() {
    let directory = tempfile::tempdir().unwrap();
    let text = "[[listener]]\naddress = \"127.0.0.1:0\"\n[admin]\naddress = \"127.0.0.1:0\"\n\
                [destination]\ntype = \"null\"\n[compression]\nlevel = 1\n[spool]\nsize = \"64MiB\"\n\
                [[principal]]\nname = \"a\"\nbearer = [{ file = \"secret\" }]\nrate = { bytes = \"1GiB\" }\n\
                [[principal]]\nname = \"b\"\nbasic = { user = \"u\", passwords = [{ file = \"secret\" }] }\n\
                [[principal]]\nname = \"c\"\nhmac = { secrets = [{ file = \"secret\" }] }\n\
                [[route]]\npath = \"/guarded\"\nprincipals = [\"a\", \"b\", \"c\"]\nallow = [\"127.0.0.1\"]\n\
                rate = { requests = 1000000000 }\n\
                [[route]]\npath = \"/*\"\n";
    std::fs::write(directory.path().join("secret"), SECRET).unwrap();
    let config = Config::parse(text, "test.toml".as_ref(), directory.path()).unwrap();
    let node = Node::start(config, false).unwrap();
    let address = node.listeners()[0];

    let large: Vec<String> = (0..8)
        .map(|index| weir_perf::event::large_event(1, index))
        .collect();
    let ndjson = weir_perf::event::ndjson(1, 0, 100);
    let small = weir_perf::event::small_event(1, 0);
    let guarded = |field: &str| {
        let length = small.len();
        let head = format!(
            "POST /guarded HTTP/1.1\r\nHost: a\r\n{field}\r\nContent-Length: {length}\r\n\r\n"
        );
        vec![format!("{head}{small}").into_bytes()]
    };
    let kinds: [(&str, Vec<Vec<u8>>, u16); 10] = [
        ("small", vec![request("/small", small.as_bytes())], 201),
        (
            "large",
            large
                .iter()
                .map(|event| request("/large", event.as_bytes()))
                .collect(),
            201,
        ),
        ("NDJSON", vec![request("/ndjson", ndjson.as_bytes())], 201),
        (
            "chunked",
            vec![chunked_request("/chunked", large[0].as_bytes(), 9_973)],
            201,
        ),
        (
            "bad JSON",
            vec![request("/bad", b"{\"a\":1}\n{\"a\":}")],
            400,
        ),
        ("token", guarded("Authorization: Bearer secret"), 201),
        (
            "password",
            guarded("Authorization: Basic dTpzZWNyZXQ="),
            201,
        ),
        ("signature", guarded(&signature(small.as_bytes())), 201),
        ("wrong token", guarded("Authorization: Bearer wrong"), 401),
        (
            "wrong method",
            vec![b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()],
            405,
        ),
    ];
    let serve = |wires: &[Vec<u8>], status: u16, count: usize| {
        // Connections that are open already: accepting allocates, and says so in the plan.
        let mut clients: Vec<Client> = (0..CONNECTIONS).map(|_| Client::connect(address)).collect();
        let mut watched_from = 0;
        // All connections at once, so that they share commits.
        for round in 0..(WARM_UP + count).div_ceil(CONNECTIONS) {
            if round * CONNECTIONS == WARM_UP {
                watched_from = ALLOCATIONS.load(Ordering::Relaxed);
            }
            for (index, client) in clients.iter_mut().enumerate() {
                client.send(&wires[(round * CONNECTIONS + index) % wires.len()]);
            }
            for client in &mut clients {
                assert_eq!(client.reply().status, status);
            }
        }
        ALLOCATIONS.load(Ordering::Relaxed) - watched_from
    };
    WATCHED.store(thread_named("weir-core-0"), Ordering::Relaxed);
    let accepts_before = ALLOCATIONS.load(Ordering::Relaxed);
    serve(&kinds[0].1, 201, 1);
    assert!(
        ALLOCATIONS.load(Ordering::Relaxed) > accepts_before,
        "accepting allocates: if this does not, the counter watches the wrong thread"
    );
    let counted: Vec<(&str, u64)> = kinds
        .iter()
        .map(|(kind, wires, status)| (*kind, serve(wires, *status, REQUESTS)))
        .collect();
    assert_eq!(
        counted,
        kinds
            .iter()
            .map(|(kind, ..)| (*kind, 0))
            .collect::<Vec<_>>()
    );
    let sealed = node
        .metrics()
        .snapshot()
        .value(weir::metrics::Count::BatchesSealed);
    assert!(
        sealed > 10,
        "batches were sealed and came back on the way: {sealed}"
    );
    WATCHED.store(0, Ordering::Relaxed);
    node.drain().unwrap();
}
