//! Databases, tables, mappings, and the rows that landed.
//!
//! Before it: [`super::engine`] commits what a blob held. After it: tests and [`super::pages`] read.
//! Thread: any. Allocates: rows, up to a count and a size per table; the oldest go first, and the totals go on counting.
//! Invariant: a blob's rows are committed all at once, or none of them.
//! Not here: queries.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::{Arc, Mutex};

use super::row::{Column, Mapping, Shape};

/// A table to create.
#[derive(Debug, Clone)]
pub struct TableOptions {
    pub database: String,
    pub table: String,
    /// Name and Kusto type, in order.
    pub columns: Vec<(String, String)>,
    /// Name and text of each JSON mapping.
    pub mappings: Vec<(String, String)>,
}

impl TableOptions {
    /// For the envelope `fluent-bit`: `timestamp:datetime, tag:string, log:dynamic`, and the mapping `fluent_bit_v1`.
    pub fn fluent_bit(database: &str, table: &str) -> TableOptions {
        let columns = [
            ("timestamp", "datetime"),
            ("tag", "string"),
            ("log", "dynamic"),
        ];
        let mapping = r#"[{"column":"timestamp","datatype":"datetime","Properties":{"Path":"$.timestamp"}},{"column":"tag","datatype":"string","Properties":{"Path":"$.tag"}},{"column":"log","datatype":"dynamic","Properties":{"Path":"$.log"}}]"#;
        TableOptions::new(database, table, &columns, &[("fluent_bit_v1", mapping)])
    }

    /// For the envelope `none`: one column `record:dynamic`, and the mapping `record_v1` that puts the whole record there.
    pub fn record(database: &str, table: &str) -> TableOptions {
        let mapping = r#"[{"column":"record","datatype":"dynamic","Properties":{"Path":"$"}}]"#;
        TableOptions::new(
            database,
            table,
            &[("record", "dynamic")],
            &[("record_v1", mapping)],
        )
    }

    pub fn new(
        database: &str,
        table: &str,
        columns: &[(&str, &str)],
        mappings: &[(&str, &str)],
    ) -> TableOptions {
        let owned = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs.map(|(a, b)| (a.to_string(), b.to_string())).collect()
        };
        TableOptions {
            database: database.into(),
            table: table.into(),
            columns: owned(columns),
            mappings: owned(mappings),
        }
    }
}

/// Totals of one table since it was created.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableCounts {
    pub rows: u64,
    /// Bytes of blobs ingested, inflated.
    pub raw_size: u64,
    pub blobs: u64,
    /// Lines of `json` blobs that were no JSON object, and so left no row.
    pub lines_skipped: u64,
    /// `dynamic` values above 1 MiB, which became null.
    pub values_nulled: u64,
    /// Blobs that were already in their batch.
    pub duplicates: u64,
    /// Blobs that `ingestIfNotExists` left out.
    pub skipped_by_tag: u64,
}

struct Table {
    columns: Arc<[Column]>,
    mappings: BTreeMap<String, (String, Arc<Mapping>)>,
    rows: VecDeque<(Vec<u8>, Shape)>,
    rows_size: usize,
    counts: TableCounts,
    /// `ingest-by:` values of the extents.
    ingested_by: HashSet<String>,
}

/// Why a blob cannot go where its message says: code and details.
pub(super) type Refused = (&'static str, String);

/// What one blob brings to its table.
#[derive(Debug)]
pub(super) struct Commit {
    pub counts: TableCounts,
    /// The newest records, oldest first.
    pub records: VecDeque<Vec<u8>>,
    pub shape: Shape,
    pub ingested_by: Vec<String>,
}

pub(super) struct Catalog {
    rows_count_max: usize,
    rows_size_max: usize,
    databases: Mutex<BTreeSet<String>>,
    tables: Mutex<BTreeMap<(String, String), Table>>,
}

fn key(database: &str, table: &str) -> (String, String) {
    (database.into(), table.into())
}

impl Catalog {
    pub fn new(rows_count_max: usize, rows_size_max: usize) -> Catalog {
        Catalog {
            rows_count_max,
            rows_size_max,
            databases: Mutex::default(),
            tables: Mutex::default(),
        }
    }

    /// How many records, and bytes of them, a table keeps.
    pub fn rows_max(&self) -> (usize, usize) {
        (self.rows_count_max, self.rows_size_max)
    }

    /// Creates a table, or creates it anew and empty.
    pub fn create_table(&self, options: &TableOptions) -> Result<(), String> {
        let columns = options.columns.iter();
        let columns: Arc<[Column]> = columns
            .map(|(name, kind)| Column::new(name, kind))
            .collect::<Result<_, _>>()?;
        let mut mappings = BTreeMap::new();
        for (name, text) in &options.mappings {
            let mapping = Mapping::parse(text, &columns)?;
            mappings.insert(name.clone(), (text.clone(), Arc::new(mapping)));
        }
        let table = Table {
            columns,
            mappings,
            rows: VecDeque::new(),
            rows_size: 0,
            counts: TableCounts::default(),
            ingested_by: HashSet::new(),
        };
        self.databases
            .lock()
            .unwrap()
            .insert(options.database.clone());
        let key = key(&options.database, &options.table);
        self.tables.lock().unwrap().insert(key, table);
        Ok(())
    }

    /// Whether there was such a table. Its database stays.
    pub fn drop_table(&self, database: &str, table: &str) -> bool {
        let mut tables = self.tables.lock().unwrap();
        tables.remove(&key(database, table)).is_some()
    }

    pub fn create_mapping(
        &self,
        database: &str,
        table: &str,
        name: &str,
        text: &str,
    ) -> Result<(), String> {
        let mut tables = self.tables.lock().unwrap();
        let table = tables
            .get_mut(&key(database, table))
            .ok_or("there is no such table")?;
        let mapping = Arc::new(Mapping::parse(text, &table.columns)?);
        table.mappings.insert(name.into(), (text.into(), mapping));
        Ok(())
    }

    /// Whether there was such a mapping.
    pub fn drop_mapping(&self, database: &str, table: &str, name: &str) -> bool {
        let mut tables = self.tables.lock().unwrap();
        let table = tables.get_mut(&key(database, table));
        table.is_some_and(|table| table.mappings.remove(name).is_some())
    }

    pub fn has_database(&self, database: &str) -> bool {
        self.databases.lock().unwrap().contains(database)
    }

    pub fn databases(&self) -> Vec<String> {
        self.databases.lock().unwrap().iter().cloned().collect()
    }

    /// `timestamp:datetime, tag:string, log:dynamic`.
    pub fn schema_text(&self, database: &str, table: &str) -> Option<String> {
        let tables = self.tables.lock().unwrap();
        let columns = tables.get(&key(database, table))?.columns.iter();
        let texts = columns.map(|column| format!("{}:{}", column.name, column.kind_name()));
        Some(texts.collect::<Vec<_>>().join(", "))
    }

    /// Name and text of each mapping.
    pub fn mappings(&self, database: &str, table: &str) -> Option<Vec<(String, String)>> {
        let tables = self.tables.lock().unwrap();
        let mappings = tables.get(&key(database, table))?.mappings.iter();
        Some(
            mappings
                .map(|(name, (text, _))| (name.clone(), text.clone()))
                .collect(),
        )
    }

    /// How records become rows of the table, by the name of a mapping, the text of one, or neither.
    pub fn shape(
        &self,
        database: &str,
        table: &str,
        reference: Option<&str>,
        inline: Option<&str>,
    ) -> Result<Shape, Refused> {
        if !self.has_database(database) {
            return Err((
                "BadRequest_DatabaseNotExist",
                format!("Database '{database}' does not exist."),
            ));
        }
        let tables = self.tables.lock().unwrap();
        let Some(found) = tables.get(&key(database, table)) else {
            return Err((
                "BadRequest_TableNotExist",
                format!("Table '{table}' does not exist."),
            ));
        };
        let mapping = match (reference, inline) {
            (None, None) => None,
            (Some(_), Some(_)) => {
                let details = "Both a mapping and a mapping reference were given.";
                return Err(("BadRequest_DuplicateMapping", details.into()));
            }
            (Some(name), None) => {
                let mapping = found.mappings.get(name).map(|(_, mapping)| mapping.clone());
                let details = format!("Mapping reference '{name}' of kind 'Json' was not found.");
                Some(mapping.ok_or(("BadRequest_MappingReferenceWasNotFound", details))?)
            }
            (None, Some(text)) => {
                let mapping = Mapping::parse(text, &found.columns);
                Some(Arc::new(
                    mapping.map_err(|details| ("BadRequest_InvalidMapping", details))?,
                ))
            }
        };
        Ok(Shape {
            columns: found.columns.clone(),
            mapping,
        })
    }

    /// Whether an extent of the table carries one of these `ingest-by:` values.
    pub fn was_ingested_by(&self, database: &str, table: &str, values: &[String]) -> bool {
        let tables = self.tables.lock().unwrap();
        let table = tables.get(&key(database, table));
        table.is_some_and(|table| values.iter().any(|value| table.ingested_by.contains(value)))
    }

    /// Adds what a blob brought. A table that was dropped meanwhile takes nothing, and says so.
    pub fn commit(&self, database: &str, table: &str, commit: Commit) -> bool {
        let mut tables = self.tables.lock().unwrap();
        let Some(found) = tables.get_mut(&key(database, table)) else {
            return false;
        };
        found.counts.add(&commit.counts);
        found.ingested_by.extend(commit.ingested_by);
        for record in commit.records {
            found.rows_size += record.len();
            found.rows.push_back((record, commit.shape.clone()));
        }
        while found.rows.len() > self.rows_count_max || found.rows_size > self.rows_size_max {
            let Some((record, _)) = found.rows.pop_front() else {
                break;
            };
            found.rows_size -= record.len();
        }
        true
    }

    /// Counts what left no row.
    pub fn count(&self, database: &str, table: &str, counts: &TableCounts) {
        if let Some(table) = self.tables.lock().unwrap().get_mut(&key(database, table)) {
            table.counts.add(counts);
        }
    }

    /// The newest `count` rows, oldest of them first, each a JSON object; `None` where there is no such table.
    pub fn rows(&self, database: &str, table: &str, count: usize) -> Option<Vec<String>> {
        let rows: Vec<_> = {
            let tables = self.tables.lock().unwrap();
            let rows = &tables.get(&key(database, table))?.rows;
            rows.iter()
                .skip(rows.len().saturating_sub(count))
                .cloned()
                .collect()
        };
        Some(
            rows.iter()
                .map(|(record, shape)| shape.row(record).text)
                .collect(),
        )
    }

    pub fn counts(&self, database: &str, table: &str) -> Option<TableCounts> {
        let tables = self.tables.lock().unwrap();
        tables.get(&key(database, table)).map(|table| table.counts)
    }

    /// Database, table and totals of every table.
    pub fn all_counts(&self) -> Vec<(String, String, TableCounts)> {
        let tables = self.tables.lock().unwrap();
        let all = tables.iter();
        all.map(|((database, table), found)| (database.clone(), table.clone(), found.counts))
            .collect()
    }
}

impl TableCounts {
    fn add(&mut self, more: &TableCounts) {
        self.rows += more.rows;
        self.raw_size += more.raw_size;
        self.blobs += more.blobs;
        self.lines_skipped += more.lines_skipped;
        self.values_nulled += more.values_nulled;
        self.duplicates += more.duplicates;
        self.skipped_by_tag += more.skipped_by_tag;
    }
}
