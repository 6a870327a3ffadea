//! A disk that fails or stalls under a running node, through the seam that the spool has for it.

mod support;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use support::{Client, records, request, rows};
use weir::config::Config;
use weir::memory::Region;
use weir::metrics::Count;
use weir::node::Node;
use weir::spool::disk::{Directory, Disk, Found, SegmentFile, Slot};

/// A real disk whose appends fail or take long.
#[derive(Clone)]
struct FaultyDisk {
    disk: Directory,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    /// Appends that succeed before the next ones fail; negative for none to fail.
    succeed: AtomicI64,
    /// Appends that fail then.
    fail: AtomicU64,
    /// Whether the bytes are written all the same, and only the sync fails.
    written: std::sync::atomic::AtomicBool,
    stall_ms: AtomicU64,
}

impl Faults {
    fn none() -> Arc<Faults> {
        let faults = Faults::default();
        faults.succeed.store(i64::MAX, Ordering::Relaxed);
        Arc::new(faults)
    }

    /// The next `count` appends fail.
    fn fail_next(&self, count: u64) {
        self.fail.store(count, Ordering::Relaxed);
        self.succeed.store(0, Ordering::Relaxed);
    }

    fn fails(&self) -> bool {
        if self.succeed.fetch_sub(1, Ordering::Relaxed) > 0 {
            return false;
        }
        let left = self.fail.load(Ordering::Relaxed);
        self.fail.store(left.saturating_sub(1), Ordering::Relaxed);
        if left == 0 {
            self.succeed.store(i64::MAX, Ordering::Relaxed);
        }
        left > 0
    }
}

impl Disk for FaultyDisk {
    fn list(&self) -> io::Result<Vec<Found>> {
        self.disk.list()
    }

    fn create(&self, slot: Slot, size: u64) -> io::Result<()> {
        self.disk.create(slot, size)
    }

    fn sync_entries(&self) -> io::Result<()> {
        self.disk.sync_entries()
    }

    fn open(&self, slot: Slot) -> io::Result<SegmentFile> {
        self.disk.open(slot)
    }

    fn read(&self, found: Found, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.read(found, buffer, offset)
    }

    fn overwrite(&self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.overwrite(slot, bytes, offset)
    }

    fn quarantine(&self, slot: Slot) -> io::Result<()> {
        self.disk.quarantine(slot)
    }

    fn remove(&self, slot: Slot) -> io::Result<()> {
        self.disk.remove(slot)
    }

    async fn append(
        &self,
        file: &SegmentFile,
        frame: Region,
        size: usize,
        offset: u64,
    ) -> (io::Result<()>, Region) {
        let stall = self.faults.stall_ms.load(Ordering::Relaxed);
        if stall > 0 {
            tokio::time::sleep(Duration::from_millis(stall)).await;
        }
        if !self.faults.fails() {
            return self.disk.append(file, frame, size, offset).await;
        }
        let error = io::Error::from_raw_os_error(libc::EIO);
        if self.faults.written.load(Ordering::Relaxed) {
            let (_, frame) = self.disk.append(file, frame, size, offset).await;
            return (Err(error), frame);
        }
        (Err(error), frame)
    }
}

/// One node at a time: what one test allocates must not show in the memory of another.
static ALONE: Mutex<()> = Mutex::new(());

struct Running {
    node: Node,
    faults: Arc<Faults>,
}

/// The directory, once a node that has just ended lets go of it.
fn take(path: &Path) -> Directory {
    let deadline = std::time::Instant::now() + support::PATIENCE;
    loop {
        if let Ok(directory) = Directory::take(path) {
            return directory;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the spool stays locked"
        );
        std::thread::yield_now();
    }
}

impl Running {
    fn start(directory: &Path, more: &str) -> Running {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let text = format!(
            "[[listener]]\naddress = \"{any}\"\n[admin]\naddress = \"{any}\"\n\
             [destination]\npath = \"out\"\n[spool]\ndirectory = \"spool\"\nsize = \"64MiB\"\n\
             [batch]\nmax_age = \"200ms\"\n{more}"
        );
        let config = Config::parse(&text, "test.toml".as_ref(), directory).unwrap();
        let faults = Faults::none();
        let disk = FaultyDisk {
            disk: take(&config.spool.directory),
            faults: faults.clone(),
        };
        let node = Node::start_on(config, false, Some(disk)).unwrap();
        Running { node, faults }
    }

    fn connect(&self) -> Client {
        Client::connect(self.node.listeners()[0])
    }

    fn count(&self, count: Count) -> u64 {
        self.node.metrics().snapshot().value(count)
    }

    fn readyz(&self) -> (u16, String) {
        let mut client = Client::connect(self.node.admin());
        client.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n");
        let reply = client.reply();
        (reply.status, reply.body)
    }
}

fn delivered(directory: &Path) -> Vec<String> {
    let mut records = records(&rows(&directory.join("out/Telemetry/Events")));
    records.sort();
    records
}

#[test]
fn a_write_that_fails_once_is_not_acknowledged_and_the_next_one_is() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for written in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let running = Running::start(directory.path(), "");
        running.faults.written.store(written, Ordering::Relaxed);
        let mut client = running.connect();
        assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
        running.faults.fail_next(1);
        let reply = client.post("/x", b"{\"b\":2}");
        assert_eq!(
            (reply.status, reply.json()["code"].as_str()),
            (503, Some("storage_fault"))
        );
        assert!(!reply.closes());
        // The batch has moved to another segment, with all that is still in memory.
        assert_eq!(client.post("/x", b"{\"c\":3}").status, 201);
        assert_eq!(running.readyz().0, 200);
        assert_eq!(running.count(Count::CommitFailures), 1);
        assert_eq!(running.count(Count::RecordsUnacknowledged), 1);
        running.node.drain().unwrap();
        // Stored although nobody was told so: sent again it would be there twice, and never lost.
        let expected = ["{\"a\":1}", "{\"b\":2}", "{\"c\":3}"];
        assert_eq!(delivered(directory.path()), expected);
        // Nothing is left that could come again.
        let running = Running::start(directory.path(), "");
        let spool = running.node.metrics().spool.as_ref().unwrap();
        assert_eq!(spool.segments.unclaimed_count(), spool.segments.count());
        running.node.drain().unwrap();
        assert_eq!(delivered(directory.path()), expected);
    }
}

#[test]
fn a_crash_after_a_failed_write_loses_nothing_and_delivers_nothing_twice() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out/Telemetry/Events");
    let running = Running::start(directory.path(), "");
    // Nothing can be delivered, so that both segments of the batch are there at the next start.
    std::fs::remove_dir(&out).unwrap();
    std::fs::write(&out, b"in the way").unwrap();
    let mut client = running.connect();
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    running.faults.fail_next(1);
    assert_eq!(client.post("/x", b"{\"b\":2}").status, 503);
    assert_eq!(client.post("/x", b"{\"c\":3}").status, 201);
    running.node.drain().unwrap();
    std::fs::remove_file(&out).unwrap();
    std::fs::create_dir(&out).unwrap();
    let running = Running::start(directory.path(), "");
    let uplink = running.node.metrics().uplink.clone();
    let deadline = std::time::Instant::now() + support::PATIENCE;
    while uplink.blobs.load(Ordering::Relaxed) < 1 {
        assert!(
            std::time::Instant::now() < deadline,
            "it is never delivered"
        );
        std::thread::yield_now();
    }
    running.node.drain().unwrap();
    assert_eq!(uplink.blobs.load(Ordering::Relaxed), 1);
    let expected = ["{\"a\":1}", "{\"b\":2}", "{\"c\":3}"];
    assert_eq!(delivered(directory.path()), expected);
}

#[test]
fn a_disk_that_fails_twice_takes_nothing_more_and_what_was_acknowledged_is_delivered() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path(), "");
    let mut client = running.connect();
    assert_eq!(client.post("/x", b"{\"a\":1}").status, 201);
    running.faults.fail_next(u64::MAX);
    for _ in 0..3 {
        let reply = client.post("/x", b"{\"b\":2}");
        assert_eq!(
            (reply.status, reply.json()["code"].as_str()),
            (503, Some("storage_fault"))
        );
    }
    let deadline = std::time::Instant::now() + support::PATIENCE;
    while running.readyz().0 == 200 {
        assert!(std::time::Instant::now() < deadline, "it never says so");
    }
    assert!(running.readyz().1.starts_with("storage_fault: "));
    running.node.drain().unwrap();
    let delivered = delivered(directory.path());
    assert!(delivered.contains(&"{\"a\":1}".to_owned()), "{delivered:?}");
    // Only the request whose commit failed was encoded; the next ones were refused before.
    let twice = delivered
        .iter()
        .filter(|record| *record == "{\"b\":2}")
        .count();
    assert!(twice <= 2, "{delivered:?}");
}

#[test]
fn a_disk_that_stalls_makes_answers_late_and_memory_stays_where_it_was() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(directory.path(), "");
    let mut clients: Vec<Client> = (0..100).map(|_| running.connect()).collect();
    let round = |clients: &mut Vec<Client>, round: usize| {
        for (index, client) in clients.iter_mut().enumerate() {
            let body = format!("{{\"round\":{round},\"i\":{index}}}");
            client.send(&request("/x", body.as_bytes()));
        }
        for client in clients.iter_mut() {
            let reply = client.reply();
            assert_eq!(reply.status, 201, "{reply:?}");
        }
    };
    round(&mut clients, 0);
    let resident = weir::admin::resident_bytes();
    let commits = running.count(Count::Commits);
    running.faults.stall_ms.store(500, Ordering::Relaxed);
    for number in 1..4 {
        round(&mut clients, number);
    }
    let commits = running.count(Count::Commits) - commits;
    // Whoever came during a stall shares the next commit.
    assert!((3..=12).contains(&commits), "{commits} commits");
    let grown = weir::admin::resident_bytes().saturating_sub(resident);
    assert!(grown < 4 << 20, "{grown} bytes more");
    running.faults.stall_ms.store(0, Ordering::Relaxed);
    running.node.drain().unwrap();
    assert_eq!(delivered(directory.path()).len(), 400);
}

#[test]
fn no_deadline_passes_and_no_answer_overtakes_while_a_request_waits_for_its_commit() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let running = Running::start(
        directory.path(),
        "[deadlines]\nhead = \"2s\"\nbody_start = \"2s\"\nbody_rate_window = \"2s\"\n\
         body = \"2s\"\nwrite = \"2s\"\n",
    );
    let first = request("/x", b"{\"a\":1}");
    let second = request("/x", b"{\"b\":2}");
    let head_size = second.len() - b"{\"b\":2}".len();
    // The second is cut in its head, behind it, and in its body: what is missing comes once the first is answered.
    let cuts = [10, head_size, head_size + 1];
    for cut in cuts {
        // Longer than any of them.
        running.faults.stall_ms.store(2_500, Ordering::Relaxed);
        let mut client = running.connect();
        client.send(&[&first, &second[..cut]].concat());
        assert_eq!(client.reply().status, 201);
        // A commit later than that: deadlines have been looked at in the meantime.
        running.faults.stall_ms.store(300, Ordering::Relaxed);
        assert_eq!(running.connect().post("/x", b"{\"c\":3}").status, 201);
        client.send(&second[cut..]);
        assert_eq!(client.reply().status, 201, "cut at {cut}");
    }
    // Answers that need no commit wait for those that do.
    running.faults.stall_ms.store(100, Ordering::Relaxed);
    let mut client = running.connect();
    let wanted_by_nobody =
        b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc";
    let parts = [
        first.clone(),
        request("/x", b"{"),
        wanted_by_nobody.to_vec(),
        first.clone(),
        first.clone(),
        b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        first.clone(),
        first.clone(),
        b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nExpect: 100-continue\r\n\r\n".to_vec(),
    ];
    client.send(&parts.concat());
    let statuses: Vec<u16> = (0..9).map(|_| client.reply().status).collect();
    assert_eq!(statuses, [201, 400, 415, 201, 201, 405, 201, 201, 100]);
    client.send(b"{\"a\":1}");
    assert_eq!(client.reply().status, 201);
    assert_eq!(running.count(Count::DeadlinesPassed), 0);
    running.faults.stall_ms.store(0, Ordering::Relaxed);
    running.node.drain().unwrap();
    assert_eq!(delivered(directory.path()).len(), 3 * cuts.len() + 6);
}
