//! The faults: what is started, what is scraped, and what goes wrong once it was scraped.

mod agents;
mod connections;
mod dials;
mod files;
mod proofs;

use std::{convert::Infallible, future::Future, pin::Pin, sync::Arc};

use culvert_loadtest::certificates::Certificates;
use tokio::sync::watch;

use super::{
    prometheus::{Prometheus, Target},
    site::Site,
};

/// What the faults share.
#[derive(Clone)]
pub(super) struct Bench {
    pub(super) certificates: Arc<Certificates>,
    /// A server for agents of which each is at fault itself. Targets lead to the agent that
    /// announces their address.
    pub(super) common: Site,
    /// Prometheus, once it has scraped all processes.
    pub(super) prometheus: watch::Receiver<Option<Arc<Prometheus>>>,
}

impl Bench {
    fn site(&self, name: &'static str) -> Site {
        Site::new(&self.certificates, name)
    }

    /// A site with certificates and files of its own.
    fn apart(name: &'static str) -> Site {
        Site::new(&Arc::new(Certificates::generate().unwrap()), name)
    }
}

/// A fault that was prepared.
pub(super) struct Fault {
    pub(super) targets: Vec<Target>,
    /// Injects the fault, and then keeps everything alive.
    pub(super) inject: Pin<Box<dyn Future<Output = Infallible>>>,
}

impl Fault {
    /// A fault of these processes, that `inject` causes; what it returns is kept.
    pub(super) fn of<K>(targets: Vec<Target>, inject: impl Future<Output = K> + 'static) -> Self {
        let inject = Box::pin(async {
            let _kept = inject.await;
            std::future::pending().await
        });
        Self { targets, inject }
    }
}

type Preparing = Pin<Box<dyn Future<Output = Fault>>>;

/// A fault's name, the alerts that fire for it and no others, and its preparation.
pub(super) type Entry = (&'static str, &'static [&'static str], Preparing);

/// The fault that needs `strace`.
pub(super) const WITH_STRACE: &str = "receiving_refused";

/// All faults.
pub(super) fn all(bench: &Bench) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    macro_rules! faults {
        ($($module:ident :: $name:ident => [$($alert:literal),*],)*) => {
            $(entries.push((
                stringify!($name),
                &[$(concat!("Culvert", $alert)),*],
                Box::pin($module::$name(bench.clone())),
            ));)*
        };
    }
    faults! {
        connections::server_killed => ["ServerDown"],
        connections::agent_killed => ["AgentDown"],
        connections::no_agents => ["ServerHasNoAgents"],
        connections::servers_differ => ["ServersDiffer"],
        connections::no_server => ["AgentHasNoServer"],
        connections::one_server_of_two => ["AgentLacksServers"],
        connections::agents_crash => ["TunnelsFlap"],
        connections::server_crashes => ["AgentFlaps", "AgentHasNoServer"],
        connections::streams_lost => ["StreamsLost"],
        connections::udp_refused => ["AgentOnTcp"],
        connections::agents_on_tcp => ["AgentsOnTcp"],
        connections::lossy_path => ["PathLosesPackets"],
        dials::unknown_hosts => ["DialsFail", "SomeDialsFail"],
        dials::too_many_streams => ["SomeDialsFail"],
        dials::targets_refuse => ["TargetsFail"],
        dials::slow_path => ["DialsSlow"],
        dials::agent_reaches_nothing => ["AgentEjected"],
        dials::metadata_service => ["EgressDenied"],
        dials::strangers_at_the_frontend => ["FrontendsRefused"],
        dials::readers_stall => ["MemoryCuts"],
        agents::few_descriptors => ["AgentOverloaded", "DescriptorsLow"],
        agents::admin_port_taken => ["ListenerUnavailable"],
        agents::log_reader_gone => ["LogLinesDropped"],
        agents::restarts => ["Restarts"],
        agents::receiving_refused => ["UdpBroken", "AgentOnTcp"],
        proofs::foreign_certificate => ["AgentsDoNotJoin"],
        proofs::http_at_the_agent_port => ["StrangersRefused"],
        proofs::reviews_refused => ["TokenReviewsFail"],
        proofs::new_token_refused => ["ProofsNotRenewed"],
        proofs::one_id_twice => ["DuplicateAgents"],
        proofs::id_of_another => ["IdentityConflicts"],
        proofs::no_lease => ["LeaseNotRenewed"],
        files::certificate_expires_soon => ["CertificateExpiresSoon"],
        files::server_certificate_expired => ["ServerCertificateExpired"],
        files::token_expires_soon => ["TokenExpiresSoon"],
        files::unusable_policy => ["ReloadFails"],
    }
    entries
}
