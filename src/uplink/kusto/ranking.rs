//! Ranking: which storage account is tried first.
//!
//! Before it: `resources.rs` has the containers and queues.
//! After it: `delivery.rs` tries the first few of the order.
//! Thread: the uplink's runtime. Allocates: for each order, and once per account.
//! Invariant: an order has every resource once; accounts that worked lately come first; and for one blob the order
//! does not change while the accounts' tiers and the list don't, so that a blob that is sent again after a crash goes
//! to the place where it may already be.
//! Not here: what counts as a failure of an account.
//!
//! The buckets, weights and tiers are those of the official clients (`_ranked_storage_account.py` in
//! Azure/azure-kusto-python). They shuffle within a tier; here the hash of account and blob name decides, which
//! spreads blobs as well and is the same tomorrow.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use crate::limits::{RANK_BUCKET_COUNT, RANK_BUCKET_TIME};
use crate::secret::SasUrl;

/// Ranks below which an account falls into the next tier, in percent.
const TIERS: [u64; 3] = [90, 70, 30];

/// How the storage accounts have done lately.
pub struct Ranking {
    started_at: Instant,
    accounts: Mutex<HashMap<String, Account>>,
}

/// The newest bucket is that of `newest`; older ones are at the indexes before it, modulo their count.
#[derive(Default)]
struct Account {
    newest: u64,
    buckets: [Bucket; RANK_BUCKET_COUNT],
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    success_count: u64,
    total_count: u64,
}

impl Ranking {
    pub fn new(now: Instant) -> Self {
        Ranking {
            started_at: now,
            accounts: Mutex::default(),
        }
    }

    /// Notes how a request to the resource's account went.
    pub fn note(&self, resource: &SasUrl, is_success: bool, now: Instant) {
        let period = self.period(now);
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let account = accounts.entry(account(resource).to_owned()).or_default();
        account.advance(period);
        let bucket = &mut account.buckets[(period % RANK_BUCKET_COUNT as u64) as usize];
        bucket.total_count += 1;
        bucket.success_count += u64::from(is_success);
    }

    /// Forgets accounts that are no longer among the resources.
    pub fn retain<'a>(&self, resources: impl Iterator<Item = &'a SasUrl>) {
        let known: std::collections::HashSet<&str> = resources.map(account).collect();
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        accounts.retain(|name, _| known.contains(&**name));
    }

    /// The resources in the order to try them for this blob: the first of the best account, the first of the second
    /// best and so on, then the second of each.
    pub fn order<'a>(
        &self,
        resources: &'a [SasUrl],
        blob_name: &str,
        now: Instant,
    ) -> Vec<&'a SasUrl> {
        let mut groups: HashMap<&str, Vec<&SasUrl>> = HashMap::new();
        for resource in resources {
            groups.entry(account(resource)).or_default().push(resource);
        }
        let period = self.period(now);
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut groups: Vec<((usize, u128), Vec<&SasUrl>)> = groups
            .into_iter()
            .map(|(name, mut group)| {
                let tier = accounts.get_mut(name).map_or(0, |account| {
                    account.advance(period);
                    account.tier()
                });
                group.sort_by_cached_key(|resource| hash(blob_name, resource.place()));
                ((tier, hash(blob_name, name)), group)
            })
            .collect();
        drop(accounts);
        groups.sort_by_key(|(key, _)| *key);
        let longest = groups.iter().map(|(_, group)| group.len()).max();
        (0..longest.unwrap_or(0))
            .flat_map(|index| groups.iter().filter_map(move |(_, group)| group.get(index)))
            .copied()
            .collect()
    }

    fn period(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.started_at);
        age.as_secs() / RANK_BUCKET_TIME.as_secs()
    }
}

impl Account {
    /// Empties the buckets that have become too old to stay, and those that nobody wrote.
    fn advance(&mut self, period: u64) {
        let passed = period.saturating_sub(self.newest);
        for step in 1..=passed.min(RANK_BUCKET_COUNT as u64) {
            let index = (self.newest + step) % RANK_BUCKET_COUNT as u64;
            self.buckets[index as usize] = Bucket::default();
        }
        self.newest = self.newest.max(period);
    }

    /// Tier 0 is the best; an account that nothing is known of is in it.
    fn tier(&self) -> usize {
        // In percent, weighted by recency: the newest bucket counts most, an empty one not at all.
        let (mut sum, mut weights) = (0, 0);
        for age in 0..RANK_BUCKET_COUNT as u64 {
            let index = (self.newest + RANK_BUCKET_COUNT as u64 - age) % RANK_BUCKET_COUNT as u64;
            let bucket = self.buckets[index as usize];
            let rate = (100 * bucket.success_count).checked_div(bucket.total_count);
            if let Some(rate) = rate {
                let weight = RANK_BUCKET_COUNT as u64 - age;
                sum += weight * rate;
                weights += weight;
            }
        }
        let rank: u64 = sum.checked_div(weights).unwrap_or(100);
        TIERS.iter().filter(|least| rank < **least).count()
    }
}

/// The account's name: the first label of its host, whatever the zone. Where the host is an address (an emulator), the
/// account is the first segment of the path.
fn account(resource: &SasUrl) -> &str {
    let place = resource.place();
    let after_scheme = place.split_once("://").map_or(place, |(_, rest)| rest);
    let (authority, path) = after_scheme.split_once('/').unwrap_or((after_scheme, ""));
    let is_address = authority.starts_with(|c: char| c.is_ascii_digit() || c == '[')
        && !authority.ends_with(|c: char| c.is_ascii_alphabetic());
    if is_address || authority.starts_with("localhost") {
        let segment = path.split('/').next().unwrap_or_default();
        let size = place.len() - path.len() + segment.len();
        return &place[..size];
    }
    authority.split('.').next().unwrap_or_default()
}

/// A hash that is the same on every machine and in every version.
fn hash(blob_name: &str, name: &str) -> u128 {
    Uuid::new_v5(&super::message::id(blob_name), name.as_bytes()).as_u128()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn resources(accounts: usize, each: usize) -> Vec<SasUrl> {
        (0..each)
            .flat_map(|index| {
                (0..accounts).map(move |account| {
                    SasUrl::new(&format!(
                        "https://k{account}.blob.core.windows.net/c{index}?sig=x"
                    ))
                })
            })
            .collect()
    }

    fn places<'a>(order: &[&'a SasUrl]) -> Vec<&'a str> {
        order.iter().map(|resource| resource.place()).collect()
    }

    #[test]
    fn an_order_has_every_resource_once_and_changes_account_at_each_step() {
        let now = Instant::now();
        let resources = resources(3, 4);
        let ranking = Ranking::new(now);
        let order = ranking.order(&resources, "b", now);
        assert_eq!(places(&order).iter().collect::<BTreeSet<_>>().len(), 12);
        for three in order.chunks(3) {
            let accounts: BTreeSet<&str> = three.iter().map(|resource| account(resource)).collect();
            assert_eq!(accounts.len(), 3);
        }
        assert_eq!(places(&order), places(&ranking.order(&resources, "b", now)));
        assert!(ranking.order(&[], "b", now).is_empty());
    }

    #[test]
    fn blobs_spread_over_accounts_and_a_list_in_another_order_is_the_same() {
        let now = Instant::now();
        let mut resources = resources(3, 2);
        let ranking = Ranking::new(now);
        let first = |resources: &[SasUrl], name: &str| {
            ranking.order(resources, name, now)[0].place().to_owned()
        };
        let names: Vec<String> = (0..600)
            .map(|index| format!("n-c0-{index}.json.gz"))
            .collect();
        let before: Vec<String> = names.iter().map(|name| first(&resources, name)).collect();
        for resource in &resources {
            let count = before
                .iter()
                .filter(|place| *place == resource.place())
                .count();
            // A sixth of 600 each, with room for chance.
            assert!((50..=150).contains(&count), "{count}");
        }
        resources.reverse();
        let after: Vec<String> = names.iter().map(|name| first(&resources, name)).collect();
        assert_eq!(before, after);
    }

    #[test]
    fn an_account_that_fails_comes_last_until_it_is_forgotten() {
        let start = Instant::now();
        let ranking = Ranking::new(start);
        let resources = resources(3, 1);
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            ranking.note(&resources[1], false, now);
            ranking.note(&resources[2], true, now);
        }
        let now = start + Duration::from_secs(59);
        for name in ["a", "b", "c", "d", "e", "f"] {
            let order = ranking.order(&resources, name, now);
            assert_eq!(order[2].place(), resources[1].place());
        }
        // A minute later nothing is left of it.
        let later = start + Duration::from_secs(120);
        let is_first =
            |name: &str| ranking.order(&resources, name, later)[0].place() == resources[1].place();
        assert!((0..50).any(|index| is_first(&index.to_string())));
    }

    #[test]
    fn tiers_follow_recent_success() {
        let start = Instant::now();
        let resource = &resources(1, 1)[0];
        let tier = |results: &[(u64, bool)]| {
            let ranking = Ranking::new(start);
            for (second, is_success) in results {
                ranking.note(resource, *is_success, start + Duration::from_secs(*second));
            }
            ranking.accounts.lock().unwrap()["k0"].tier()
        };
        assert_eq!(tier(&[(0, true)]), 0);
        assert_eq!(tier(&[(0, false)]), 3);
        assert_eq!(tier(&[(0, true), (1, true), (2, true), (3, false)]), 1);
        assert_eq!(tier(&[(0, true), (1, false)]), 2);
        // Six of eleven parts good: the newer bucket weighs six, the older five.
        assert_eq!(tier(&[(0, false), (10, true)]), 2);
        // After an hour only the last result is known.
        assert_eq!(tier(&[(0, false), (3600, true)]), 0);
    }

    #[test]
    fn accounts_are_named_by_the_first_label() {
        for (url, expected) in [
            ("https://k1st00.blob.core.windows.net/c?sig=x", "k1st00"),
            ("https://k1st00.queue.core.windows.net/q?sig=x", "k1st00"),
            ("https://acct.z37.blob.storage.azure.net/c?sig=x", "acct"),
            ("https://1a.blob.core.windows.net/c", "1a"),
            (
                "http://127.0.0.1:10000/devstoreaccount1/c?sig=x",
                "http://127.0.0.1:10000/devstoreaccount1",
            ),
            ("http://[::1]:10000/a/c?sig=x", "http://[::1]:10000/a"),
            ("http://localhost:1/a/c?sig=x", "http://localhost:1/a"),
        ] {
            assert_eq!(account(&SasUrl::new(url)), expected);
        }
    }

    #[test]
    fn accounts_that_are_gone_are_forgotten() {
        let now = Instant::now();
        let ranking = Ranking::new(now);
        let resources = resources(2, 1);
        for resource in &resources {
            ranking.note(resource, false, now);
        }
        ranking.retain(resources[..1].iter());
        assert_eq!(ranking.accounts.lock().unwrap().len(), 1);
    }
}
