//! The disk as the spool sees it: files of one directory, written at an offset and synced.
//!
//! Before it: [`crate::commit`] appends frames; [`crate::spool`] makes, marks and removes files.
//! After it: the kernel. This trait is the seam where tests put a disk that fails, stalls or forgets.
//! Thread: [`Disk::append`] on a reactor, through its ring; everything else blocks, off the reactors.
//! Allocates: names and handles; `append` nothing.
//! Invariant: what returned without an error is on stable storage, directory entries included; and a segment is open for
//! appending in one place at a time.
//! Not here: what is in the bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use io_uring::{cqueue, opcode, types};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

use crate::limits::SECTOR_SIZE;
use crate::memory::Region;

/// A segment's file, open for appending.
#[derive(Debug)]
pub struct SegmentFile {
    /// In the spool's directory.
    pub slot: Slot,
    /// Absent on a disk that is no real one.
    pub handle: Option<File>,
}

/// The number of a segment's file: `segment-00000012`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    pub fn file_name(self) -> String {
        format!("segment-{:08}", self.0)
    }

    /// The name it has once it is quarantined.
    pub fn quarantine_name(self) -> String {
        format!("quarantined-{:08}", self.0)
    }

    fn parse(name: &str, prefix: &str) -> Option<Slot> {
        let digits = name.strip_prefix(prefix)?;
        let number = digits.parse().ok()?;
        (digits.len() == 8).then_some(Slot(number))
    }
}

/// A file that [`Disk::list`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    pub slot: Slot,
    pub size: u64,
    pub quarantined: bool,
}

/// Files of one directory. A clone is the same directory.
pub trait Disk: Clone + Send + Sync + 'static {
    /// The segments there are, in any order.
    fn list(&self) -> io::Result<Vec<Found>>;

    /// Makes a file of `size` zeros whose space is allocated; durable after [`Disk::sync_entries`].
    fn create(&self, slot: Slot, size: u64) -> io::Result<()>;

    /// Makes the names of new files durable. What a file's length and place are, its first synced write settles.
    fn sync_entries(&self) -> io::Result<()>;

    /// Opens a segment to append to it.
    fn open(&self, slot: Slot) -> io::Result<SegmentFile>;

    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read(&self, found: Found, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Overwrites some sectors of a segment.
    fn overwrite(&self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Gives a segment its other name.
    fn quarantine(&self, slot: Slot) -> io::Result<()>;

    fn remove(&self, slot: Slot) -> io::Result<()>;

    /// Writes the first `size` bytes of `frame` at `offset`; the frame comes back either way.
    /// After an error the file is not to be written again.
    fn append(
        &self,
        file: &SegmentFile,
        frame: Region,
        size: usize,
        offset: u64,
    ) -> impl Future<Output = (io::Result<()>, Region)>;
}

/// A directory that this process has locked.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
    /// Keeps the lock; absent for who only reads.
    _lock: Option<Arc<File>>,
    direct: bool,
}

/// Why a directory could not be taken.
#[derive(Debug)]
pub enum TakeError {
    /// Another process has it.
    Locked,
    Io(io::Error),
}

impl From<io::Error> for TakeError {
    fn from(source: io::Error) -> Self {
        TakeError::Io(source)
    }
}

impl Directory {
    /// Makes the directory if need be, and locks it for this process.
    pub fn take(path: &Path) -> Result<Directory, TakeError> {
        std::fs::create_dir_all(path)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join("lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(TakeError::Locked),
            Err(error) => return Err(TakeError::Io(error.into())),
        }
        let directory = Directory {
            path: path.to_owned(),
            _lock: Some(Arc::new(lock)),
            direct: direct_io_works(path),
        };
        directory.sync_entries()?;
        directory.await_writes()?;
        Ok(directory)
    }

    /// The directory to read in, beside the process that has it.
    pub fn observe(path: &Path) -> Directory {
        Directory {
            path: path.to_owned(),
            _lock: None,
            direct: false,
        }
    }

    /// Waits until no write of an earlier process is on its way any more. One that was killed is gone before its ring is,
    /// and a write that lands late would damage what this process has written by then. The ring's operations hold the
    /// lock that [`Disk::open`] takes.
    fn await_writes(&self) -> io::Result<()> {
        for found in self.list()?.into_iter().filter(|found| !found.quarantined) {
            let file = File::open(self.segment(found.slot))?;
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                tracing::info!(
                    segment = found.slot.file_name(),
                    "waiting for a write of the last run to end"
                );
                flock(&file, FlockOperation::LockExclusive)?;
            }
        }
        Ok(())
    }

    fn segment(&self, slot: Slot) -> PathBuf {
        self.path.join(slot.file_name())
    }
}

/// Whether whole sectors can be written past the page cache here. It saves a copy, and pages that nobody reads again.
/// tmpfs cannot on older kernels, nor can a disk whose blocks are larger than [`SECTOR_SIZE`].
fn direct_io_works(directory: &Path) -> bool {
    let probe = directory.join("probe");
    let works = || {
        let mut frame = Region::map(2 * SECTOR_SIZE)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&probe)?;
        file.write_all_at(&frame[..2 * SECTOR_SIZE], 0)?;
        file.write_all_at(&frame[..SECTOR_SIZE], SECTOR_SIZE as u64)?;
        file.read_exact_at(&mut frame[..SECTOR_SIZE], SECTOR_SIZE as u64)
    };
    let outcome: io::Result<()> = works();
    let _ = std::fs::remove_file(&probe);
    outcome.is_ok()
}

impl Disk for Directory {
    fn list(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let slots = [("segment-", false), ("quarantined-", true)]
                .map(|(prefix, quarantined)| (Slot::parse(name, prefix), quarantined));
            for (slot, quarantined) in slots {
                if let Some(slot) = slot {
                    found.push(Found {
                        slot,
                        size: entry.metadata()?.len(),
                        quarantined,
                    });
                }
            }
        }
        Ok(found)
    }

    fn create(&self, slot: Slot, size: u64) -> io::Result<()> {
        let path = self.segment(slot);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        let allocated = match fallocate(&file, FallocateFlags::empty(), 0, size) {
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(&file, size),
            outcome => outcome.map_err(io::Error::from),
        };
        if allocated.is_err() {
            // A part of a segment is none.
            let _ = std::fs::remove_file(&path);
        }
        allocated
    }

    fn sync_entries(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn open(&self, slot: Slot) -> io::Result<SegmentFile> {
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        let handle = OpenOptions::new()
            .write(true)
            .custom_flags(flags)
            .open(self.segment(slot))?;
        flock(&handle, FlockOperation::NonBlockingLockExclusive)?;
        Ok(SegmentFile {
            slot,
            handle: Some(handle),
        })
    }

    fn read(&self, found: Found, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let name = if found.quarantined {
            found.slot.quarantine_name()
        } else {
            found.slot.file_name()
        };
        let file = File::open(self.path.join(name))?;
        let mut size = 0;
        while size < buffer.len() {
            match file.read_at(&mut buffer[size..], offset + size as u64) {
                Ok(0) => break,
                Ok(more) => size += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(size)
    }

    fn overwrite(&self, slot: Slot, bytes: &[u8], offset: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.segment(slot))?;
        file.write_all_at(bytes, offset)?;
        file.sync_data()
    }

    fn quarantine(&self, slot: Slot) -> io::Result<()> {
        let quarantined = self.path.join(slot.quarantine_name());
        std::fs::rename(self.segment(slot), quarantined)?;
        self.sync_entries()
    }

    fn remove(&self, slot: Slot) -> io::Result<()> {
        std::fs::remove_file(self.segment(slot))?;
        self.sync_entries()
    }

    async fn append(
        &self,
        file: &SegmentFile,
        frame: Region,
        size: usize,
        offset: u64,
    ) -> (io::Result<()>, Region) {
        let handle = file.handle.as_ref().expect("a file of a real disk");
        assert!(size <= frame.len());
        // One operation that is a write and its fdatasync: two linked ones could be torn apart where the submission
        // queue is full between them.
        let entry = opcode::Write::new(types::Fd(handle.as_raw_fd()), frame.as_ptr(), size as u32)
            .offset(offset)
            .rw_flags(libc::RWF_DSYNC)
            .build();
        // The operation owns the memory until it completes, also if this future is dropped.
        let (written, frame) = UnsubmittedOneshot::new(frame, Written, entry)
            .submit()
            .await;
        let outcome = written.and_then(|written| {
            // The rest could be written once more, but a disk that stops in mid-frame is not one to trust.
            if written == size {
                Ok(())
            } else {
                Err(io::Error::new(
                    io::ErrorKind::WriteZero,
                    format!("{written} of {size} bytes were written"),
                ))
            }
        });
        (outcome, frame)
    }
}

struct Written;

impl OneshotOutputTransform for Written {
    type Output = (io::Result<usize>, Region);
    type StoredData = Region;

    fn transform_oneshot_output(self, frame: Region, cqe: cqueue::Entry) -> Self::Output {
        let written =
            usize::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()));
        (written, frame)
    }
}

/// What `fallocate` does where the file system has none.
fn write_zeros(file: &File, size: u64) -> io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < size {
        let piece = zeros.len().min((size - offset) as usize);
        file.write_all_at(&zeros[..piece], offset)?;
        offset += piece as u64;
    }
    Ok(())
}
