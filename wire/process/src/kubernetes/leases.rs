//! The Leases of a set of servers, as lists and watches report them.

use std::collections::HashMap;

use k8s_openapi::{api::coordination::v1::Lease, jiff::Timestamp};
use kube::runtime::watcher::{self, Event};

use super::{lease_expiry, reason, status_text};

/// Annotation of a server's Lease with its addresses for agents: an address and a port, or several
/// separated by commas.
pub const ADDRESS_ANNOTATION: &str = "culvert/agent-address";

/// Maximum length of a holder's name and of its address, in bytes.
const MAX_LENGTH: usize = 255;

/// The server that a Lease is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Name of the server, at most 255 bytes; empty in a Lease without one.
    pub id: String,
    /// What [`ADDRESS_ANNOTATION`] contains, at most 255 bytes; not checked.
    pub address: Option<String>,
    expiry: Timestamp,
}

/// Leases by name, each with its holder and its expiry.
#[derive(Debug, Default)]
pub struct Leases {
    /// `None` before the first list.
    known: Option<HashMap<String, Holder>>,
    /// A list that is not complete yet.
    listed: HashMap<String, Holder>,
}

impl Leases {
    /// Records an event of a watch.
    pub fn on_event(&mut self, event: Event<Lease>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(lease) => record(&mut self.listed, lease),
            Event::InitDone => self.known = Some(std::mem::take(&mut self.listed)),
            Event::Apply(lease) => record(self.known.get_or_insert_default(), lease),
            Event::Delete(lease) => {
                if let (Some(known), Some(name)) = (&mut self.known, lease.metadata.name) {
                    known.remove(&name);
                }
            }
        }
    }

    /// Records a complete list.
    pub fn on_list(&mut self, leases: impl IntoIterator<Item = Lease>) {
        let mut known = HashMap::new();
        leases.into_iter().for_each(|lease| record(&mut known, lease));
        self.known = Some(known);
    }

    /// The holders of the Leases that have not expired; `None` before the first list.
    ///
    /// There is no timer for expiry. Live servers renew their Leases, and the next such event shows
    /// that another one has expired. Without any event kube-apiserver does not answer, neither to
    /// this process nor to the servers that renew, and the last holders stay.
    pub fn valid(&self, now: Timestamp) -> Option<impl Iterator<Item = &Holder>> {
        let known = self.known.as_ref()?;
        Some(known.values().filter(move |holder| holder.expiry > now))
    }
}

/// Records a Lease. One without an expiry counts as none.
fn record(leases: &mut HashMap<String, Holder>, lease: Lease) {
    let Some(name) = lease.metadata.name else { return };
    let Some(expiry) = lease.spec.as_ref().and_then(lease_expiry) else {
        leases.remove(&name);
        return;
    };
    let short = |text: &String| text.len() <= MAX_LENGTH;
    let id = lease.spec.and_then(|spec| spec.holder_identity).filter(short).unwrap_or_default();
    let mut annotations = lease.metadata.annotations.unwrap_or_default();
    let address = annotations.remove(ADDRESS_ANNOTATION).filter(short);
    leases.insert(name, Holder { id, address, expiry });
}

/// Why a watch failed, for logs.
pub fn watch_error(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => reason(error),
        watcher::Error::WatchError(status) => status_text(status),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::coordination::v1::LeaseSpec,
        apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    };

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn lease(name: &str, renewed: Option<i64>) -> Lease {
        Lease {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                holder_identity: Some(format!("holder of {name}")),
                renew_time: renewed.map(at).map(MicroTime),
                lease_duration_seconds: Some(30),
                ..LeaseSpec::default()
            }),
        }
    }

    fn list(all: &mut Leases, leases: impl IntoIterator<Item = Lease>) {
        all.on_event(Event::Init);
        leases.into_iter().for_each(|lease| all.on_event(Event::InitApply(lease)));
        all.on_event(Event::InitDone);
    }

    fn count(leases: &Leases, second: i64) -> Option<usize> {
        leases.valid(at(second)).map(Iterator::count)
    }

    #[test]
    fn nothing_is_known_before_the_list_is_complete() {
        let mut leases = Leases::default();
        leases.on_event(Event::Init);
        assert_eq!(count(&leases, 100), None);
        leases.on_event(Event::InitApply(lease("a", Some(100))));
        assert_eq!(count(&leases, 100), None);
        leases.on_event(Event::InitDone);
        assert_eq!(count(&leases, 100), Some(1));
    }

    #[test]
    fn valid_leases_are_known_as_they_come_and_go() {
        let mut leases = Leases::default();
        list(&mut leases, [lease("a", Some(100)), lease("b", Some(110)), lease("c", None)]);
        assert_eq!(count(&leases, 120), Some(2));
        leases.on_event(Event::Apply(lease("c", Some(120))));
        assert_eq!(count(&leases, 120), Some(3));
        leases.on_event(Event::Delete(lease("b", Some(110))));
        assert_eq!(count(&leases, 120), Some(2));
        assert_eq!(count(&leases, 131), Some(1), "one has expired");
    }

    #[test]
    fn a_new_list_replaces_the_one_before() {
        let mut leases = Leases::default();
        list(&mut leases, [lease("a", Some(100)), lease("b", Some(100))]);
        leases.on_event(Event::Init);
        assert_eq!(count(&leases, 101), Some(2), "until the new one is complete");
        leases.on_event(Event::InitApply(lease("a", Some(100))));
        leases.on_event(Event::InitDone);
        assert_eq!(count(&leases, 101), Some(1));
        leases.on_list([]);
        assert_eq!(count(&leases, 101), Some(0));
    }

    #[test]
    fn a_holder_has_its_name_and_its_address_unless_they_are_too_long() {
        let mut own = lease("a", Some(100));
        let mut annotate = |value: String| {
            own.metadata.annotations = Some([(ADDRESS_ANNOTATION.to_owned(), value)].into());
            let mut leases = Leases::default();
            leases.on_list([own.clone()]);
            let holder = leases.valid(at(100)).unwrap().next().cloned().unwrap();
            (holder.id, holder.address)
        };
        let (id, address) = ("holder of a".to_owned(), "10.0.0.1:8132".to_owned());
        assert_eq!(annotate(address.clone()), (id.clone(), Some(address)));
        assert_eq!(annotate("1".repeat(256)), (id, None));
    }
}
