//! `docs/SPOOL_FORMAT.md` is what the code writes and reads: its example, byte by byte.

mod support;

use std::io::Read;

use support::sim_disk::SimDisk;
use uuid::Uuid;
use weir::limits::{FRAME_BUFFER_SIZE, SECTOR_SIZE, SEGMENT_HEADER_SIZE, segment_size};
use weir::spool::disk::{Found, Slot};
use weir::spool::frame::Totals;
use weir::spool::reader::{SegmentReader, Tail};
use weir::spool::recover::{State, state_of};
use weir::spool::segment::{BatchId, SegmentCursor, SegmentHeader, delivery_mark};

const DOCUMENT: &str = include_str!("../docs/SPOOL_FORMAT.md");

/// The bytes of a hex dump in the document: `offset  bytes`, 16 to a line; what is left out is zero.
fn dump(title: &str) -> Vec<(usize, Vec<u8>)> {
    let (_, rest) = DOCUMENT.split_once(title).expect(title);
    let (_, rest) = rest.split_once("```text\n").unwrap();
    let (dump, _) = rest.split_once("```").unwrap();
    dump.lines()
        .map(|line| {
            let (offset, bytes) = line.split_once("  ").unwrap();
            let bytes = bytes
                .split(' ')
                .map(|byte| u8::from_str_radix(byte, 16).unwrap());
            (usize::from_str_radix(offset, 16).unwrap(), bytes.collect())
        })
        .collect()
}

fn segment() -> Vec<u8> {
    let mut segment = vec![0; segment_size(64 << 10)];
    for (offset, bytes) in dump("## The example") {
        segment[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    segment
}

fn header() -> SegmentHeader<'static> {
    SegmentHeader {
        segment_id: 0x0102_0304_0506_0708,
        segment_size: segment_size(64 << 10) as u64,
        batch: BatchId {
            run: Uuid::from_u128(0x019a_b5f3_7c00_7000_8000_0000_0000_002a),
            sequence: 12,
            core: 3,
        },
        database: "Telemetry".into(),
        table: "Events".into(),
    }
}

#[test]
fn the_example_is_read_as_the_document_says() {
    let disk = SimDisk::new(0);
    disk.be_good();
    let segment = segment();
    let found = Found {
        slot: Slot(0),
        size: segment.len() as u64,
        quarantined: false,
    };
    disk.put(found.slot, segment);
    assert_eq!(state_of(&disk, found).unwrap(), State::Pending(header()));
    let mut window = vec![0; FRAME_BUFFER_SIZE];
    let reader = SegmentReader::new(&disk, found, header().segment_id, &mut window);
    let contents = reader.contents(&header()).unwrap();
    assert_eq!((contents.totals.row_count, contents.frame_count), (1, 1));
    assert_eq!(contents.tail, Tail::Clean);
    let mut blob = Vec::new();
    SegmentReader::new(&disk, found, header().segment_id, &mut window)
        .copy_member(&contents.totals, &mut blob)
        .unwrap();
    let mut rows = String::new();
    flate2::bufread::GzDecoder::new(blob.as_slice())
        .read_to_string(&mut rows)
        .unwrap();
    assert_eq!(rows, "{\"hello\":\"weir\"}\n");
}

#[test]
fn the_code_writes_the_example() {
    let segment = segment();
    // The payload is the compressor's; everything around it is the format's.
    let payload_size = u32::from_le_bytes(segment[4096 + 24..4096 + 28].try_into().unwrap());
    let payload = &segment[4096 + 64..4096 + 64 + payload_size as usize];
    let totals = Totals {
        member_size: payload.len() as u64,
        raw_size: 17,
        raw_crc: zlib_crc(b"{\"hello\":\"weir\"}\n"),
        row_count: 1,
    };
    let mut written = vec![0; FRAME_BUFFER_SIZE];
    let cursor = SegmentCursor::new(header().segment_id, header().segment_size);
    let write = cursor.stage(&mut written, payload, totals, Totals::default(), header);
    assert_eq!(write.offset, SECTOR_SIZE as u64);
    let end = write.offset as usize + write.size;
    assert!(written[..write.size] == segment[write.offset as usize..end]);
    assert_eq!(end, SEGMENT_HEADER_SIZE + SECTOR_SIZE);
}

#[test]
fn the_mark_is_the_documents() {
    let mut mark = [0; SECTOR_SIZE];
    for (offset, bytes) in dump("The mark of the example") {
        mark[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    assert_eq!(mark, delivery_mark(header().segment_id));
}

/// CRC-32 by a second implementation.
fn zlib_crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
