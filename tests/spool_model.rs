//! The spool against a plain model, on a disk that forgets, reorders and tears what was not synced.
//!
//! A schedule is a list of random actions: requests, commits that take their time, sealing, delivery, failing writes,
//! and crashes in the middle of any of them. After each crash the spool is opened anew from what the disk has kept.
//! What must hold: an acknowledged row reaches its destination, in one blob, unchanged; no row comes from nowhere.
//!
//! `WEIR_MODEL_SCHEDULES=100000 cargo test --release --test spool_model` runs more of them;
//! `WEIR_MODEL_SEED=<seed>` runs the one that a failure names.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::{self, Read};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use support::sim_disk::{Random, SimDisk};
use uuid::Uuid;
use weir::ack::Ticket;
use weir::commit::commit;
use weir::config::{Ack, Config};
use weir::error::Refusal;
use weir::limits::FRAME_BUFFER_SIZE;
use weir::memory::Region;
use weir::metrics::CoreMetrics;
use weir::spool::Spool;
use weir::spool::recover::pending_batches;
use weir::uplink::Handover;
use weir::upload_buffer::{Batch, UploadBuffers};

const SCHEDULES_IN_CI: u64 = 1_000;
const ACTIONS: usize = 60;

/// Limits so small that every buffer fills, every segment is used again, and the spool runs out.
const CONFIG: &str = r#"
    [spool]
    size = "72KiB"
    [upload]
    buffer_count = 2
    buffer_size = "4KiB"
    [limits]
    record = "1KiB"
    [[route]]
    path = "/a"
    table = "A"
    [[route]]
    path = "/b"
    table = "B"
"#;

/// One life of the process.
struct Life {
    spool: Arc<Spool<SimDisk>>,
    buffers: Rc<UploadBuffers>,
    handover: Arc<Handover>,
    committing: Pin<Box<dyn Future<Output = ()>>>,
    /// Requests that wait for their answer, with their rows.
    waiting: Vec<(Ticket, Vec<String>)>,
}

struct Model {
    seed: u64,
    random: Random,
    disk: SimDisk,
    config: Config,
    row_next: u64,
    filler_max: u64,
    runs: u64,
    /// Every row that was ever appended.
    appended: BTreeSet<String>,
    acknowledged: BTreeSet<String>,
    /// What the destination holds: rows by blob.
    blobs: BTreeMap<String, Vec<String>>,
    refused_full: u64,
    failed: u64,
    window: Vec<u8>,
}

impl Model {
    fn new(seed: u64) -> Model {
        let mut random = Random::new(seed);
        Model {
            seed,
            disk: SimDisk::new(random.next()),
            filler_max: [900, 20][random.below(2) as usize],
            random,
            config: Config::parse(CONFIG, "model.toml".as_ref(), ".".as_ref()).unwrap(),
            row_next: 0,
            runs: 0,
            appended: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            blobs: BTreeMap::new(),
            refused_full: 0,
            failed: 0,
            window: vec![0; FRAME_BUFFER_SIZE],
        }
    }

    /// Opens what the disk has, and takes up what an earlier life left. `None` where it crashed on the way.
    fn open(&mut self) -> Option<Life> {
        self.disk.restart();
        self.runs += 1;
        let run = Uuid::from_u64_pair(self.runs, self.random.next());
        let opened = Spool::open(self.disk.clone(), &self.config, run).ok();
        if self.disk.crashed() {
            return None;
        }
        let mut opened = opened.expect("a disk that works");
        let spool = opened.spool;
        for segments in pending_batches(&mut opened.pending) {
            let recovered = spool.recover(segments, &opened.tables, &mut self.window);
            if self.disk.crashed() {
                return None;
            }
            if let Some(batch) = recovered.expect("a disk that works") {
                spool.segments().defer(batch);
            }
        }
        let quarantined = &spool.metrics().segments_quarantined;
        assert_eq!(
            quarantined.load(std::sync::atomic::Ordering::Relaxed),
            0,
            "seed {}: a crash was taken for damage",
            self.seed
        );
        let metrics = Arc::new(CoreMetrics::new());
        let buffer_count = self.config.upload.buffer_count;
        let segments = Some(spool.segments().clone());
        let handover = Arc::new(Handover::new(buffer_count, 0, segments.clone()));
        let buffers = UploadBuffers::map(
            run,
            0,
            &self.config,
            segments,
            handover.clone(),
            metrics.clone(),
        );
        let buffers = Rc::new(buffers.unwrap());
        let frame = Region::map(FRAME_BUFFER_SIZE).unwrap();
        Some(Life {
            committing: Box::pin(commit(buffers.clone(), self.disk.clone(), frame, metrics)),
            spool,
            buffers,
            handover,
            waiting: Vec::new(),
        })
    }

    /// A request of some rows for one table.
    fn request(&mut self, life: &mut Life) {
        let table_index = self.random.below(2) as usize;
        let row_count = 1 + self.random.below(6);
        // Small rows use up the room that a segment has for heads, large ones its buffer.
        let filler = self.random.below(self.filler_max) as usize;
        let rows: Vec<String> = (0..row_count)
            .map(|_| {
                self.row_next += 1;
                // Little of it can be compressed, so that buffers fill.
                let noise: String = (0..filler)
                    .map(|_| char::from(b'a' + self.random.below(26) as u8))
                    .collect();
                format!("{}-{noise}", self.row_next)
            })
            .collect();
        let size: usize = rows.iter().map(|row| row.len() + 1).sum();
        let outcome = life
            .buffers
            .claim(table_index, rows.len(), size)
            .map(|()| self.append(life, table_index, &rows));
        life.buffers.unclaim();
        match outcome {
            Ok(true) => {
                let position = life.buffers.position(table_index);
                life.buffers.complete(table_index, false);
                let ack = Ack::Durable;
                let ticket = Ticket {
                    table_index,
                    position,
                    ack,
                };
                life.waiting.push((ticket, rows));
            }
            // Refused half way: nobody is told that it is stored.
            Ok(false) => life.buffers.complete(table_index, false),
            Err(Refusal::SpoolFull) => self.refused_full += 1,
            Err(refusal) => assert_eq!(refusal, Refusal::StorageFault),
        }
    }

    /// Whether all rows found room. What they wait for happens meanwhile, now and then.
    fn append(&mut self, life: &mut Life, table_index: usize, rows: &[String]) -> bool {
        for row in rows {
            let mut patience = 8;
            loop {
                match life.buffers.try_reserve(table_index, row.len() + 1) {
                    Ok(true) => break,
                    Ok(false) if patience > 0 => {
                        patience -= 1;
                        self.commit(life);
                        life.spool.refill();
                    }
                    _ => return false,
                }
            }
            self.appended.insert(row.clone());
            let line = format!("{row}\n");
            life.buffers.append(table_index, line.as_bytes(), 1);
        }
        true
    }

    /// Lets the commits go on, and hears who is acknowledged.
    fn commit(&mut self, life: &mut Life) {
        let mut context = Context::from_waker(Waker::noop());
        let polled = life.committing.as_mut().poll(&mut context);
        assert_eq!(polled, Poll::Pending, "commits go on for ever");
        self.hear(life);
    }

    fn hear(&mut self, life: &mut Life) {
        let mut context = Context::from_waker(Waker::noop());
        let acks = life.buffers.acks();
        let (acknowledged, failed) = (&mut self.acknowledged, &mut self.failed);
        life.waiting.retain_mut(|(ticket, rows)| {
            let mut settled = std::pin::pin!(acks.settled(*ticket, None));
            match settled.as_mut().poll(&mut context) {
                Poll::Pending => true,
                Poll::Ready(Ok(())) => {
                    acknowledged.extend(rows.drain(..));
                    false
                }
                Poll::Ready(Err(refusal)) => {
                    assert_eq!(refusal, Refusal::StorageFault);
                    *failed += 1;
                    false
                }
            }
        });
    }

    fn next_batch(&mut self, life: &Life) -> Option<Batch> {
        if self.random.below(2) == 0 {
            let backlog = life.spool.segments().backlog_next();
            backlog.or_else(|| life.handover.receive())
        } else {
            let sealed = life.handover.receive();
            sealed.or_else(|| life.spool.segments().backlog_next())
        }
    }

    /// Brings a batch to its destination, and usually records it.
    fn deliver(&mut self, life: &mut Life) -> bool {
        let Some(mut batch) = self.next_batch(life) else {
            return false;
        };
        let content = match (&batch.memory, &batch.spooled) {
            (Some(memory), _) => memory.bytes().to_vec(),
            (None, Some(spooled)) => {
                let mut content = Vec::new();
                let mut reader = life.spool.reader(spooled, &mut self.window);
                let read = reader.copy_member(&batch.totals, &mut content);
                if self.disk.crashed() {
                    return false;
                }
                read.expect("what was durable can be read");
                content
            }
            (None, None) => panic!("a batch that is nowhere"),
        };
        assert_eq!(content.len() as u64, batch.blob_size());
        let rows = rows(&content);
        assert_eq!(rows.len() as u64, batch.totals.row_count);
        self.blobs.insert(batch.id.blob_name(), rows);
        if let Some(memory) = batch.memory.take() {
            life.buffers.give_back(memory.into_buffer());
        }
        match batch.spooled {
            // Delivered, and the process ends before it could say so.
            Some(_) if self.random.below(8) == 0 => self.disk.crash_now(),
            Some(spooled) => life.spool.retire(&spooled),
            None => {}
        }
        true
    }

    fn act(&mut self, life: &mut Life) {
        // With small rows it takes many commits to fill a segment, and nothing else in between.
        let kinds = if self.filler_max < 100 && self.random.below(8) > 0 {
            13
        } else {
            20
        };
        match self.random.below(kinds) {
            0..=8 => self.request(life),
            9..=12 => self.commit(life),
            13 => life.buffers.seal_older_than(Duration::ZERO),
            14..=16 => {
                self.deliver(life);
            }
            17 => {
                if let Some(buffer) = life.handover.take_back() {
                    // What the pool does with it.
                    life.buffers.give_back(buffer);
                }
            }
            18 => {
                let after = self.random.below(6);
                self.disk.crash_after(after);
            }
            _ => {
                if self.random.below(3) == 0 {
                    self.disk.fail_next_append();
                }
            }
        }
        life.spool.refill();
    }

    fn run(&mut self) {
        let mut life = self.open();
        let actions = if self.filler_max < 100 {
            2 * ACTIONS
        } else {
            ACTIONS
        };
        for _ in 0..actions {
            match &mut life {
                Some(alive) => {
                    self.act(alive);
                    if self.disk.crashed() {
                        life = None;
                    }
                }
                None => life = self.open(),
            }
        }
        drop(life);
        // The last life has a disk that works, and time to deliver everything.
        self.disk.crash_now();
        self.disk.be_good();
        let mut life = self.open().expect("a disk that works");
        while self.deliver(&mut life) {
            if self.disk.crashed() {
                life = self.open().expect("a disk that works");
            }
        }
        self.check();
        life.spool.make_missing().expect("a disk that works");
        let segments = life.spool.segments();
        assert_eq!(
            segments.unclaimed_count(),
            segments.count(),
            "seed {}: a segment is lost",
            self.seed
        );
    }

    fn check(&self) {
        let seed = self.seed;
        let mut found = BTreeSet::new();
        for (blob, rows) in &self.blobs {
            for row in rows {
                let sent = self.appended.contains(row);
                assert!(sent, "seed {seed}: nobody sent {row} of {blob}");
                let once = found.insert(row);
                assert!(once, "seed {seed}: {row} of {blob} is in another blob too");
            }
        }
        for row in &self.acknowledged {
            assert!(
                found.contains(row),
                "seed {seed}: {row} was acknowledged and is lost"
            );
        }
    }
}

/// The rows of a blob, which must be one complete gzip member.
fn rows(blob: &[u8]) -> Vec<String> {
    let mut decoder = flate2::bufread::GzDecoder::new(blob);
    let mut text = String::new();
    let read: io::Result<usize> = decoder.read_to_string(&mut text);
    read.expect("a complete member");
    assert!(decoder.into_inner().is_empty(), "bytes after the member");
    text.lines().map(str::to_owned).collect()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn what_is_acknowledged_survives_every_schedule() {
    if let Some(seed) = number("WEIR_MODEL_SEED") {
        Model::new(seed).run();
        return;
    }
    let schedules = number("WEIR_MODEL_SCHEDULES").unwrap_or(SCHEDULES_IN_CI);
    let (mut rows, mut acknowledged, mut lives) = (0, 0, 0);
    let (mut full, mut failed) = (0, 0);
    for seed in 0..schedules {
        let mut model = Model::new(seed);
        model.run();
        rows += model.appended.len();
        acknowledged += model.acknowledged.len();
        lives += model.runs;
        full += model.refused_full;
        failed += model.failed;
    }
    println!(
        "{schedules} schedules: {lives} lives, {rows} rows, {acknowledged} acknowledged, \
         {full} requests refused by a full spool, {failed} by a failed write"
    );
    // A model in which nothing happens proves nothing.
    assert!(acknowledged * 4 > rows && lives > 2 * schedules);
    assert!(full > 0 && failed > 0);
}
