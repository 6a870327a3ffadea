//! A disk in memory that keeps what was synced, and of the rest whatever a seed says: each sector by itself.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use weir::limits::SECTOR_SIZE;
use weir::memory::Region;
use weir::spool::disk::{Disk, Found, SegmentFile, Slot};

/// Numbers from a seed (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

struct Sim {
    /// What survives a crash: files whose names are durable.
    files: BTreeMap<Slot, Vec<u8>>,
    /// Files whose names are not durable yet.
    made: BTreeMap<Slot, Vec<u8>>,
    random: Random,
    crashed: bool,
    /// Operations until the next crash.
    crash_after: Option<u64>,
    fail_next_append: bool,
    good: bool,
}

/// A handle to the disk; all clones are one disk.
#[derive(Clone)]
pub struct SimDisk {
    sim: Arc<Mutex<Sim>>,
}

fn fault() -> io::Error {
    io::Error::from_raw_os_error(5)
}

impl Sim {
    /// Whether the operation that begins now is cut off by a crash. Every one after it fails.
    fn crashes_now(&mut self) -> bool {
        if let Some(left) = &mut self.crash_after {
            if *left == 0 {
                self.crash_after = None;
                self.crashed = true;
                return true;
            }
            *left -= 1;
        }
        false
    }

    fn file(&mut self, slot: Slot) -> io::Result<&mut Vec<u8>> {
        let file = self.files.get_mut(&slot);
        let file = file.or_else(|| self.made.get_mut(&slot));
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Writes some of the sectors: those that got there before the crash, in whatever order.
    fn write_some(&mut self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut random = self.random.clone();
        let file = self.file(slot)?;
        for (index, sector) in bytes.chunks(SECTOR_SIZE).enumerate() {
            if random.below(2) == 0 {
                let at = offset as usize + index * SECTOR_SIZE;
                file[at..at + sector.len()].copy_from_slice(sector);
            }
        }
        self.random = random;
        Ok(())
    }

    fn write_all(&mut self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()> {
        let at = offset as usize;
        self.file(slot)?[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

impl SimDisk {
    pub fn new(seed: u64) -> SimDisk {
        SimDisk {
            sim: Arc::new(Mutex::new(Sim {
                files: BTreeMap::new(),
                made: BTreeMap::new(),
                random: Random::new(seed),
                crashed: false,
                crash_after: None,
                fail_next_append: false,
                good: false,
            })),
        }
    }

    /// Puts a segment there.
    pub fn put(&self, slot: Slot, bytes: Vec<u8>) {
        self.sim.lock().unwrap().files.insert(slot, bytes);
    }

    /// The machine is on again. Names that were not synced are there or not.
    pub fn restart(&self) {
        let mut sim = self.sim.lock().unwrap();
        let made = std::mem::take(&mut sim.made);
        for (slot, file) in made {
            if sim.random.below(2) == 0 {
                sim.files.insert(slot, file);
            }
        }
        sim.crashed = false;
        sim.crash_after = None;
        sim.fail_next_append = false;
        if !sim.good && sim.random.below(8) == 0 {
            sim.crash_after = Some(sim.random.clone().below(12));
        }
    }

    pub fn crashed(&self) -> bool {
        self.sim.lock().unwrap().crashed
    }

    pub fn crash_now(&self) {
        self.sim.lock().unwrap().crashed = true;
    }

    /// Crashes in the middle of an operation to come.
    pub fn crash_after(&self, operations: u64) {
        self.sim.lock().unwrap().crash_after = Some(operations);
    }

    pub fn fail_next_append(&self) {
        self.sim.lock().unwrap().fail_next_append = true;
    }

    /// From now on nothing happens by itself.
    pub fn be_good(&self) {
        self.sim.lock().unwrap().good = true;
    }

    /// Runs a blocking operation, or cuts it off.
    fn operation<T>(
        &self,
        whole: impl FnOnce(&mut Sim) -> io::Result<T>,
        cut: impl FnOnce(&mut Sim) -> io::Result<()>,
    ) -> io::Result<T> {
        let mut sim = self.sim.lock().unwrap();
        if sim.crashed {
            return Err(fault());
        }
        if sim.crashes_now() {
            cut(&mut sim)?;
            return Err(fault());
        }
        whole(&mut sim)
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<Found>> {
        let list = |sim: &mut Sim| {
            let found = sim.files.iter().map(|(slot, file)| Found {
                slot: *slot,
                size: file.len() as u64,
                quarantined: false,
            });
            Ok(found.collect())
        };
        self.operation(list, |_| Ok(()))
    }

    fn create(&self, slot: Slot, size: u64) -> io::Result<()> {
        let make = |sim: &mut Sim| {
            sim.made.insert(slot, vec![0; size as usize]);
            Ok(())
        };
        self.operation(make, make)
    }

    fn sync_entries(&self) -> io::Result<()> {
        let sync = |sim: &mut Sim| {
            let mut made = std::mem::take(&mut sim.made);
            sim.files.append(&mut made);
            Ok(())
        };
        self.operation(sync, |_| Ok(()))
    }

    fn open(&self, slot: Slot) -> io::Result<SegmentFile> {
        let open = |sim: &mut Sim| {
            sim.file(slot)?;
            Ok(SegmentFile { slot, handle: None })
        };
        self.operation(open, |_| Ok(()))
    }

    fn read(&self, found: Found, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = |sim: &mut Sim| {
            let file = sim.file(found.slot)?;
            let begin = (offset as usize).min(file.len());
            let size = buffer.len().min(file.len() - begin);
            buffer[..size].copy_from_slice(&file[begin..begin + size]);
            Ok(size)
        };
        self.operation(read, |_| Ok(()))
    }

    fn overwrite(&self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.operation(
            |sim| sim.write_all(slot, bytes, offset),
            |sim| sim.write_some(slot, bytes, offset),
        )
    }

    fn quarantine(&self, slot: Slot) -> io::Result<()> {
        panic!("{slot:?} is put aside, and nothing was damaged")
    }

    fn remove(&self, slot: Slot) -> io::Result<()> {
        let remove = |sim: &mut Sim| {
            sim.files.remove(&slot);
            Ok(())
        };
        // Whether the name was gone when the crash came is for the seed to say.
        self.operation(remove, |sim| {
            if sim.random.below(2) == 0 {
                sim.files.remove(&slot);
            }
            Ok(())
        })
    }

    async fn append(
        &self,
        file: &SegmentFile,
        frame: Region,
        size: usize,
        offset: u64,
    ) -> (io::Result<()>, Region) {
        // A write takes a while, in which rows go on being appended.
        let mut polls = self.sim.lock().unwrap().random.below(3);
        std::future::poll_fn(|_| {
            if polls == 0 {
                return Poll::Ready(());
            }
            polls -= 1;
            Poll::Pending
        })
        .await;
        let outcome = {
            let mut sim = self.sim.lock().unwrap();
            if sim.crashed {
                Err(fault())
            } else if sim.crashes_now() || std::mem::take(&mut sim.fail_next_append) {
                let written = sim.write_some(file.slot, &frame[..size], offset);
                written.and(Err(fault()))
            } else {
                sim.write_all(file.slot, &frame[..size], offset)
            }
        };
        (outcome, frame)
    }
}
