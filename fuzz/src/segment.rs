//! Recovery of a segment: any bytes as the file, and a good file that was tampered with.
//!
//! The first byte chooses. Tampered with: rows and commits are made of the input, then bytes of the file are changed or
//! the file is cut, as the input says. What comes out must be a prefix of the rows that went in.

use std::io::{self, Read};
use std::sync::Arc;

use weir::deflate::{GzipMember, MEMBER_END_SIZE};
use weir::limits::{FRAME_BUFFER_SIZE, segment_size};
use weir::memory::Region;
use weir::spool::disk::{Disk, Found, SegmentFile, Slot};
use weir::spool::frame::Totals;
use weir::spool::reader::SegmentReader;
use weir::spool::recover::{State, state_of};
use weir::spool::segment::{BatchId, SegmentCursor, SegmentHeader};

const BUFFER_SIZE: usize = 8 << 10;
const ROWS_MAX: u64 = 64;

/// One file, read only.
#[derive(Clone)]
struct OneFile(Arc<Vec<u8>>);

impl Disk for OneFile {
    fn list(&self) -> io::Result<Vec<Found>> {
        unreachable!("one file")
    }

    fn create(&self, _: Slot, _: u64) -> io::Result<()> {
        unreachable!("read only")
    }

    fn sync_entries(&self) -> io::Result<()> {
        unreachable!("read only")
    }

    fn open(&self, _: Slot) -> io::Result<SegmentFile> {
        unreachable!("read only")
    }

    fn read(&self, _: Found, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let begin = usize::try_from(offset).map_or(self.0.len(), |at| at.min(self.0.len()));
        let size = buffer.len().min(self.0.len() - begin);
        buffer[..size].copy_from_slice(&self.0[begin..begin + size]);
        Ok(size)
    }

    fn overwrite(&self, _: Slot, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("read only")
    }

    fn quarantine(&self, _: Slot) -> io::Result<()> {
        unreachable!("read only")
    }

    fn remove(&self, _: Slot) -> io::Result<()> {
        unreachable!("read only")
    }

    async fn append(
        &self,
        _: &SegmentFile,
        _: Region,
        _: usize,
        _: u64,
    ) -> (io::Result<()>, Region) {
        unreachable!("read only")
    }
}

pub fn check(bytes: &[u8]) {
    match bytes.split_first() {
        Some((first, rest)) if first % 2 == 1 => tampered(rest),
        Some((_, rest)) => {
            read(rest.to_vec());
        }
        None => {}
    }
}

/// Reads a file; the member of its whole frames, where it holds a batch.
fn read(file: Vec<u8>) -> Option<(Totals, Vec<u8>)> {
    let found = Found {
        slot: Slot(0),
        size: file.len() as u64,
        quarantined: false,
    };
    let disk = OneFile(Arc::new(file));
    let state = state_of(&disk, found).expect("a file that can be read");
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let mut outcome = None;
    if let State::Pending(header) = state {
        let contents = SegmentReader::new(&disk, found, header.segment_id, &mut window)
            .contents(&header)
            .expect("a file that can be read");
        let mut member = Vec::new();
        SegmentReader::new(&disk, found, header.segment_id, &mut window)
            .copy_member(&contents.totals, &mut member)
            .expect("whole frames can be read again");
        let size = contents.totals.member_size as usize + MEMBER_END_SIZE;
        assert_eq!(member.len(), size);
        outcome = Some((contents.totals, member));
    }
    outcome
}

fn tampered(bytes: &[u8]) {
    let mut input = bytes.iter().copied();
    let mut next = || input.next().unwrap_or(0);
    let size = segment_size(BUFFER_SIZE);
    let header = SegmentHeader {
        segment_id: u64::from(next()),
        segment_size: size as u64,
        batch: BatchId {
            run: uuid::Uuid::nil(),
            sequence: 0,
            core: 0,
        },
        database: "D".into(),
        table: "T".into(),
    };
    let mut file = vec![0; size];
    let mut memory = vec![0; BUFFER_SIZE];
    let mut member = GzipMember::new(1);
    member.open(&mut memory);
    let mut cursor = SegmentCursor::new(header.segment_id, header.segment_size);
    let mut frame = vec![0; FRAME_BUFFER_SIZE];
    let mut rows = Vec::new();
    let mut durable = Totals::default();
    for row_index in 0..u64::from(next()) % ROWS_MAX {
        let row = format!("{row_index}:{}\n", "x".repeat(usize::from(next())));
        if !member.fits(&mut memory, row.len()) || !cursor.fits(member.size_max_after(row.len())) {
            break;
        }
        member.append(&mut memory, row.as_bytes());
        rows.extend_from_slice(row.as_bytes());
        if next() % 2 == 0 {
            continue;
        }
        member.flush(&mut memory);
        let totals = Totals {
            member_size: member.size() as u64,
            raw_size: member.raw_size(),
            raw_crc: member.raw_crc(),
            row_count: row_index + 1,
        };
        let member = &memory[..member.size()];
        let write = cursor.stage(&mut frame, member, totals, durable, || header.clone());
        file[write.offset as usize..][..write.size].copy_from_slice(&frame[..write.size]);
        cursor.advance(&write);
        durable = totals;
    }
    let changes = next() % 4;
    for _ in 0..changes {
        let at = usize::from(u16::from_le_bytes([next(), next()])) % size;
        file[at] ^= next();
    }
    if next() % 4 == 0 {
        file.truncate(usize::from(u16::from_le_bytes([next(), next()])) % size);
    } else if changes == 0 && durable.row_count > 0 {
        let (totals, _) = read(file.clone()).expect("nothing was changed");
        assert_eq!(totals, durable);
    }
    if let Some((totals, member)) = read(file) {
        assert!(totals.row_count <= durable.row_count);
        let mut text = Vec::new();
        if totals.member_size > 0 {
            flate2::read::GzDecoder::new(member.as_slice())
                .read_to_end(&mut text)
                .expect("a complete member");
        }
        assert!(rows.starts_with(&text), "rows that nobody wrote");
        let lines = text.iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(lines as u64, totals.row_count);
    }
}
