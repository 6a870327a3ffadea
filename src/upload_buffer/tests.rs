//! The pool without a spool: sealing, sharing, waiting. With one: `tests/spool_model.rs`.

use super::*;
use crate::config::Config;

fn buffers(text: &str) -> (UploadBuffers, Arc<Handover>) {
    let config = Config::parse(text, "test.toml".as_ref(), ".".as_ref()).unwrap();
    let handover = Arc::new(Handover::new(config.upload.buffer_count, 0, None));
    let metrics = Arc::new(CoreMetrics::new());
    let buffers =
        UploadBuffers::map(Uuid::nil(), 0, &config, None, handover.clone(), metrics).unwrap();
    (buffers, handover)
}

const TWO_TABLES: &str = r#"
    [upload]
    buffer_count = 2
    buffer_size = "64KiB"
    [limits]
    record = "16KiB"
    [[route]]
    path = "/a"
    ack = "memory"
    table = "A"
    [[route]]
    path = "/b"
    ack = "memory"
    table = "B"
    [[route]]
    path = "/c"
    ack = "memory"
    table = "C"
"#;

#[test]
fn a_full_buffer_is_sealed_and_the_pool_never_grows() {
    let (buffers, handover) = buffers(TWO_TABLES);
    let row = [b'x'; 1_000];
    let mut row_count = 0_u64;
    while buffers.try_reserve(0, row.len()) == Ok(true) {
        buffers.append(0, &row, 1);
        row_count += 1;
        assert!(row_count < 1_000_000);
        if handover.sealed_count() == 2 {
            break;
        }
    }
    assert_eq!(buffers.try_reserve(0, row.len()), Ok(false));
    let batches = [handover.receive().unwrap(), handover.receive().unwrap()];
    assert!(handover.receive().is_none());
    assert_eq!(
        batches
            .iter()
            .map(|batch| batch.totals.row_count)
            .sum::<u64>(),
        row_count
    );
    assert_eq!((batches[0].id.sequence, batches[1].id.sequence), (0, 1));
    for batch in batches {
        assert_eq!(batch.totals.raw_size, batch.totals.row_count * 1_000);
        buffers.give_back(batch.memory.unwrap().into_buffer());
    }
    assert_eq!(
        buffers.counts(),
        UploadBufferCounts {
            free: 2,
            open: 0,
            sealed: 0,
            in_uplink: 0
        }
    );
}

#[test]
fn with_more_tables_than_buffers_the_oldest_open_one_makes_room() {
    let (buffers, handover) = buffers(TWO_TABLES);
    for table_index in [0, 1] {
        assert_eq!(buffers.try_reserve(table_index, 8), Ok(true));
        buffers.append(table_index, b"{\"a\":1}\n", 1);
    }
    assert_eq!(
        buffers.try_reserve(2, 8),
        Ok(false),
        "its buffer is still with the uplink"
    );
    let batch = handover.receive().unwrap();
    assert_eq!(batch.table_index, 0);
    buffers.give_back(batch.memory.unwrap().into_buffer());
    assert_eq!(buffers.try_reserve(2, 8), Ok(true));
}

#[test]
fn a_reservation_waits_for_a_buffer_to_come_back() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (buffers, handover) = buffers(TWO_TABLES);
        let buffers = std::rc::Rc::new(buffers);
        for table_index in [0, 1] {
            assert_eq!(buffers.try_reserve(table_index, 8), Ok(true));
            buffers.append(table_index, b"{\"a\":1}\n", 1);
        }
        let waiting = {
            let buffers = buffers.clone();
            tokio::task::spawn_local(async move { buffers.reserve(2, 8, None).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        buffers.give_back(handover.receive().unwrap().memory.unwrap().into_buffer());
        assert_eq!(waiting.await.unwrap(), Ok(()));
    });
}

#[test]
fn an_open_buffer_without_rows_has_no_age_and_makes_no_blob() {
    let (buffers, handover) = buffers(TWO_TABLES);
    assert_eq!(buffers.try_reserve(0, 8), Ok(true));
    buffers.seal_older_than(Duration::ZERO);
    assert!(handover.receive().is_none());
    buffers.append(0, b"{\"a\":1}\n", 1);
    buffers.seal_older_than(Duration::from_secs(3_600));
    assert!(handover.receive().is_none());
    buffers.seal_older_than(Duration::ZERO);
    assert_eq!(handover.receive().unwrap().totals.row_count, 1);
}
